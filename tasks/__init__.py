"""Prefect tasks: one per stage of the pipeline, each a supervised subprocess."""
