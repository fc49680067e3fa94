"""Prefect tasks: one for each stage of the pipeline, each a supervised subprocess."""
