"""Applying a plan: the only part with side effects on a run."""
