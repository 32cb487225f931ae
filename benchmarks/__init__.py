"""Benchmarks: registered cases that check their result before they time it. `python -m benchmarks --help`."""
