"""The store: encoded items, finished artifacts, workspaces in progress, and an index of files by content."""
