"""The stages: each module runs one from its Inputs and Runtime alone, and from what the loader makes of the items."""
