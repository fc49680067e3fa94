"""Command line: `python -m sfgrpo COMMAND`, a stage of the pipeline or its upkeep, configured by params.yaml.

Exit status: 0 done, 1 failed, 2 wrong configuration (told before any model loads), 75 told to stop and resumable: what
started it starts it again, and it goes on.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable

from sfgrpo.commands import COMMANDS
from sfgrpo.errors import ConfigError, Preempted, SfgrpoError
from sfgrpo.rank import is_first_rank, noting_errors
from sfgrpo.redaction import SecretFreeFormatter, print_error, without_secrets
from sfgrpo.status import ExitStatus


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sfgrpo",
        description="Fine-tunes flow-matching text-to-image models with Stepwise-Flow-GRPO, one stage at a time.",
        epilog="The stages run in the order prompts, train, evaluate, register; `dvc repro` runs the first three, "
        "`make demo` all. Values live in params.yaml; where things run, in MLFLOW_TRACKING_URI, MLFLOW_RUN_ID, "
        "SFGRPO_SCRATCH, SFGRPO_MIRROR (S3 bucket that keeps a copy of every run), SFGRPO_S3_ENCRYPTION, "
        "SFGRPO_DEVICE, SFGRPO_EVALUATION_DEVICE, SFGRPO_NUM_THREADS, SFGRPO_TIMEOUT_S and SFGRPO_GRACE_S; flows set "
        "SFGRPO_FLOW_RUN_ID, SFGRPO_FLOW_RUN_URL and SFGRPO_BRANCH, and read SFGRPO_DVC_REMOTE; where the nodes of a "
        "training meet, in torchrun's PET_RDZV_ENDPOINT and PET_RDZV_ID. SIGTERM, SIGUSR1 and Ctrl-C make a training "
        "save its state and stop. Exit status: 0 done, 1 failed, 2 wrong configuration, 75 stopped and resumable.",
    )
    words = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sentence = f"{command.help[0].upper()}{command.help[1:]}."
        command.take(words.add_parser(name, help=command.help, description=sentence))
    return parser


def prepare() -> None:
    """Sets up logging, without secrets; only the first rank tells more than warnings, of our own modules alone."""
    level = logging.INFO if is_first_rank() else logging.WARNING
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(SecretFreeFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
    sys.excepthook = print_error
    for name in ("httpx", "matplotlib", "accelerate", "botocore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def guarded(command: Callable[[], None]) -> int:
    """Runs a command, words the errors that a user can mend, and returns the exit status."""
    try:
        with noting_errors():
            command()
    except Preempted as error:
        if is_first_rank():
            print(without_secrets(f"stopped: {error}"), file=sys.stderr)
        return ExitStatus.RESUMABLE
    except ConfigError as error:
        print(without_secrets(f"error: {error}"), file=sys.stderr)
        return ExitStatus.WRONG_CONFIGURATION
    except (SfgrpoError, OSError) as error:
        print(without_secrets(f"error: {error}"), file=sys.stderr)
        return ExitStatus.FAILED
    return ExitStatus.DONE


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    chosen = _parser().parse_args(arguments)
    prepare()
    return guarded(lambda: COMMANDS[chosen.command].run(chosen))


if __name__ == "__main__":
    sys.exit(main())
