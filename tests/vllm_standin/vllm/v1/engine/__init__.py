"""Its engine."""
