"""The engine of today."""
