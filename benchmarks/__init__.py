"""Scripts that measure; each prints a table and, with --json, writes the figures to a file. No test fails on a time."""
