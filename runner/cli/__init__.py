"""The commands: one file a verb; heavy imports only inside functions."""
