"""Command line of the study: `python -m sfgrpo.study cell FORM ROW SEED` runs one cell, `report FORM` the report.

Exit status as of `python -m sfgrpo`: 0 done, 1 failed, 2 wrong configuration.
"""

from __future__ import annotations

import argparse
import sys

from sfgrpo.cli import guarded, prepare
from sfgrpo.runtime.environment import read_environment


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sfgrpo.study",
        description="Compares Stepwise-Flow-GRPO with Flow-GRPO by experiments/study.yaml; see `make study`.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    cell = commands.add_parser("cell", help="train one row with one seed; resumes an interrupted one by itself")
    report = commands.add_parser("report", help="write the report on all cells that are done")
    for command in (cell, report):
        command.add_argument("form", help="form of the study, such as short")
    cell.add_argument("row", help="parameter file in experiments/shapes, without its ending")
    cell.add_argument("seed", type=int, help="seed of the run")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    chosen = _parser().parse_args(arguments)
    prepare()

    def command() -> None:
        from sfgrpo.study.config import load_plan

        plan, environment = load_plan(chosen.form), read_environment()
        if chosen.command == "cell":
            from sfgrpo.study.run import run_cell

            run_cell(plan, chosen.row, chosen.seed, environment)
        else:
            from sfgrpo.study.report import write_report

            write_report(plan, environment)

    return guarded(command)


if __name__ == "__main__":
    sys.exit(main())
