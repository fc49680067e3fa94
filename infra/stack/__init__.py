"""The local stack: PostgreSQL, S3, MLflow, Prefect and a worker on this machine, under supervisord."""
