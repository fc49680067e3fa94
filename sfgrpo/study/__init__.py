"""Trains both methods over rows and seeds, and reports how they compare."""
