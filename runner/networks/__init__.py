"""Adapters: attaching, initialising, merging."""
