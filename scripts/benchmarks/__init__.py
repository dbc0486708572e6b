"""Benchmarks, each against its peers in the same run: `scripts/bench NAME`."""
