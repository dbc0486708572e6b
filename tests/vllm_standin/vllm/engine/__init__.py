"""Engines and what they are told."""
