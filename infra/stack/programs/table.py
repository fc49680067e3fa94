"""All programs, in the order in which they are shown; they are stopped in reverse."""

from __future__ import annotations

from infra.stack.program import Program
from infra.stack.programs.mlflow import MLFLOW
from infra.stack.programs.postgres import POSTGRES
from infra.stack.programs.prefect import PREFECT
from infra.stack.programs.s3 import S3
from infra.stack.programs.webhook import WEBHOOK
from infra.stack.programs.worker import WORKER

PROGRAMS: dict[str, Program] = {program.name: program for program in (POSTGRES, S3, MLFLOW, PREFECT, WEBHOOK, WORKER)}
