"""Command line: `python -m sfgrpo STAGE`, one stage of the pipeline, configured by params.yaml.

Exit status: 0 done, 1 failed, 2 wrong configuration (told before any model loads), 75 told to stop and resumable: what
started it starts it again, and it goes on.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from sfgrpo.batches import BatchArithmetic
from sfgrpo.config import load_config, to_flat_dict
from sfgrpo.environment import read_environment
from sfgrpo.errors import ConfigError, Preempted, SfgrpoError
from sfgrpo.paths import PARAMS
from sfgrpo.preemption import LAUNCHER_MARGIN_S, StopNotice
from sfgrpo.rank import die_with_launcher, is_first_rank, is_rank, noting_errors
from sfgrpo.redaction import SecretFreeFormatter, print_error, without_secrets
from sfgrpo.status import ExitStatus

HELP = {
    "pretrain": "train the shapes base model from scratch (most of an hour on two cores; it ships trained)",
    "pretrain_reward": "train the shapes world's CLIP, a reward model (some 15 minutes; it ships trained)",
    "prompts": "write the training and evaluation prompts to data/prompts",
    "train": "train the adapter by Stepwise-Flow-GRPO; resumes an interrupted run by itself",
    "evaluate": "judge base model and trained policy by GenEval, before and after",
    "register": "register the trained policy as a model version in MLflow",
    "show": "print the resolved configuration and the batch arithmetic of a training",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sfgrpo",
        description="Fine-tunes flow-matching text-to-image models with Stepwise-Flow-GRPO, one stage at a time.",
        epilog="The stages run in the order prompts, train, evaluate, register; `dvc repro` runs the first three, "
        "`make demo` all. Values live in params.yaml; where things run, in MLFLOW_TRACKING_URI, MLFLOW_RUN_ID, "
        "SFGRPO_SCRATCH, SFGRPO_MIRROR (S3 bucket that keeps a copy of every run), SFGRPO_S3_ENCRYPTION, "
        "SFGRPO_DEVICE, SFGRPO_NUM_THREADS, SFGRPO_TIMEOUT_S and SFGRPO_GRACE_S; where the nodes of a training meet, "
        "in torchrun's PET_RDZV_ENDPOINT and PET_RDZV_ID. SIGTERM, SIGUSR1 and Ctrl-C make a training "
        "save its state and stop. Exit status: 0 done, 1 failed, 2 wrong configuration, 75 stopped and resumable.",
    )
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for name, text in HELP.items():
        stage = stages.add_parser(name, help=text, description=text.capitalize() + ".")
        stage.add_argument("--params", type=Path, default=Path(PARAMS), help="parameter file (%(default)s)")
        if name == "train":
            stage.add_argument("--resume", metavar="RUN", help="go on with this run, by its own parameters and prompts")
    return parser


def show(params: Path) -> None:
    """Prints every parameter of a training and the numbers that follow from them."""
    config, launch = load_config("train", params), load_config("launch", params)
    for key, value in {**to_flat_dict(config), **to_flat_dict(launch)}.items():
        print(f"{key:32}{value}")
    print(f"\n{BatchArithmetic(config=config, num_processes=launch.launch.world_size).explain()}")


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


def run(stage: str, params: Path) -> None:
    """Runs one stage of the pipeline other than the training."""
    config = load_config(stage, params)
    environment = read_environment()
    from sfgrpo import stages

    getattr(stages, stage)(config, environment)


def train(params: Path, run_name: str | None) -> None:
    """Trains in this process or, where there are to be several, as their launcher or as one of them.

    By the parameters, unless it is to go on with a run that has its own.
    """
    launch = load_config("launch", params).launch
    environment = read_environment()
    if is_rank():
        die_with_launcher()
    from sfgrpo.training import find_inputs, train_policy

    inputs = None if run_name is None else find_inputs(run_name, environment)
    config = load_config("train", params if inputs is None else inputs / PARAMS)
    if not is_rank():
        BatchArithmetic(config=config, num_processes=launch.world_size)
    if is_rank() or launch.world_size == 1:
        train_policy(config, environment, launch, inputs)
        return
    command = ["-m", "sfgrpo", "train", "--params", str(params), *(() if run_name is None else ("--resume", run_name))]
    with StopNotice(environment.grace_s + LAUNCHER_MARGIN_S) as notice:
        from sfgrpo.launcher import launch_ranks

        launch_ranks(launch, environment, command, notice)


def main(arguments: list[str] | None = None) -> int:
    """Runs one stage and returns the exit status."""
    chosen = _parser().parse_args(arguments)
    prepare()
    commands: dict[str, Callable[[], None]] = {
        "show": lambda: show(chosen.params),
        "train": lambda: train(chosen.params, chosen.resume),
    }
    return guarded(commands.get(chosen.stage, lambda: run(chosen.stage, chosen.params)))


if __name__ == "__main__":
    sys.exit(main())
