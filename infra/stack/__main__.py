"""Command line: `python -m infra.stack up|down|status|run PROGRAM`, configured by STACK_ variables.

Exit status: 0 done, 1 failed, or not everything is healthy, 2 wrong settings, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys

from infra.stack.commands import down, run_program, status, up
from infra.stack.programs.table import PROGRAMS
from sfgrpo.errors import ConfigError, SfgrpoError


def main(arguments: list[str] | None = None) -> int:
    """Run one command; print the errors that a user can correct; return the exit status."""
    chosen = _parser().parse_args(arguments)
    try:
        match chosen.command:
            case "up":
                up()
            case "down":
                down()
            case "run":
                run_program(chosen.program)
            case "status":
                return 0 if status(as_json=chosen.json) else 1
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (SfgrpoError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what was started keeps running, and `make stack-down` stops it", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m infra.stack",
        description="PostgreSQL, S3, MLflow, Prefect and a worker on this machine, under supervisord.",
        epilog="Set by STACK_DIR, STACK_HOST, STACK_POSTGRES_PORT, STACK_S3_PORT, STACK_MLFLOW_PORT, "
        "STACK_PREFECT_PORT, STACK_WEBHOOK_PORT, STACK_AUTH, STACK_ALLOW_ROOT and STACK_ORIGINS; see infra/README.md.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("up", help="start everything that does not run, and wait until it is healthy")
    commands.add_parser("down", help="stop everything, and keep the data")
    report = commands.add_parser("status", help="show the state of each program; exit status 1 unless all are healthy")
    report.add_argument("--json", action="store_true", help="as JSON")
    one = commands.add_parser("run", help="run one program in place of this process; for supervisord")
    one.add_argument("program", choices=PROGRAMS, metavar="PROGRAM", help=", ".join(PROGRAMS))
    return parser


if __name__ == "__main__":
    sys.exit(main())
