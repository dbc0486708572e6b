"""Decisions: pure functions over snapshots. No clock, no randomness, no I/O, so each can be replayed."""
