"""Prefect flows: which tasks run, in which order."""
