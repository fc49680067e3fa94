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
from sfgrpo.status import ExitStatus

HELP = {
    "pretrain": "train the shapes base model from scratch (most of an hour on two cores; it ships trained)",
    "pretrain_reward": "train the shapes world's CLIP, a reward model (some 15 minutes; it ships trained)",
    "prompts": "write the training and evaluation prompts to data/prompts",
    "train": "train the adapter by Stepwise-Flow-GRPO; resumes an interrupted run by itself",
    "evaluate": "judge base model and trained policy by GenEval, before and after",
    "register": "register the trained policy as a model version in MLflow",
    "promote": "judge a registered version against the champion, and make it champion if it is better",
    "rollback": "make the champion before the present one champion again",
    "recheck": "have the champion draw once more, and tell whether it still draws what it drew",
    "show": "print the resolved configuration and the batch arithmetic of a training",
}
SAMPLE_HELP = "draw one image by a registered version and write it as a PNG file"


QUIET_H = 1.0
"""An update of the largest model takes minutes; a run that records nothing for so long looks dead."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sfgrpo",
        description="Fine-tunes flow-matching text-to-image models with Stepwise-Flow-GRPO, one stage at a time.",
        epilog="The stages run in the order prompts, train, evaluate, register; `dvc repro` runs the first three, "
        "`make demo` all. Values live in params.yaml; where things run, in MLFLOW_TRACKING_URI, MLFLOW_RUN_ID, "
        "SFGRPO_SCRATCH, SFGRPO_MIRROR (S3 bucket that keeps a copy of every run), SFGRPO_DEVICE, SFGRPO_NUM_THREADS, "
        "SFGRPO_TIMEOUT_S and SFGRPO_GRACE_S; flows set SFGRPO_FLOW_RUN_ID, SFGRPO_FLOW_RUN_URL and SFGRPO_BRANCH, and "
        "read SFGRPO_DVC_REMOTE; where the nodes of a "
        "training meet, in torchrun's PET_RDZV_ENDPOINT and PET_RDZV_ID. SIGTERM, SIGUSR1 and Ctrl-C make a training "
        "save its state and stop. Exit status: 0 done, 1 failed, 2 wrong configuration, 75 stopped and resumable.",
    )
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for name, text in HELP.items():
        stage = stages.add_parser(name, help=text, description=text.capitalize() + ".")
        stage.add_argument("--params", type=Path, default=Path(PARAMS), help="parameter file (%(default)s)")
        if name == "train":
            stage.add_argument("--resume", metavar="RUN", help="go on with this run, by its own parameters and prompts")
        if name in ("promote", "rollback", "recheck"):
            stage.add_argument("--model", metavar="NAME", help="registered model (registry.model_name)")
        if name == "promote":
            _add_promotion(stage)
    _add_sample(stages.add_parser("sample", help=SAMPLE_HELP, description=SAMPLE_HELP.capitalize() + "."))
    _add_sweep(stages)
    _add_retention(stages)
    return parser


def _add_promotion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--version", type=int, metavar="N", help="candidate (the version with the alias of registry)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--judge-only", action="store_true", help="decide and record, but move no alias")
    form.add_argument("--apply", metavar="RUN", help="move the aliases as an earlier call decided, by its MLflow run")


def _add_sample(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="what to draw")
    parser.add_argument("--model", required=True, metavar="ADDRESS", help="models:/NAME@ALIAS or models:/NAME/NUMBER")
    parser.add_argument("--out", type=Path, default=Path("sample.png"), help="PNG file to write (%(default)s)")
    parser.add_argument("--seed", type=int, help="of the start noise (the version's)")
    parser.add_argument("--steps", type=int, help="denoising steps (the version's)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance weight (the version's)")


def _add_sweep(stages: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "end the MLflow runs whose process on this machine is gone, and list silent ones of other machines"
    sweep = stages.add_parser("sweep", help=text, description=text.capitalize() + ".")
    sweep.add_argument("--quiet-h", type=float, default=QUIET_H, help="hours without a record (%(default)g)")
    sweep.add_argument("--report", type=Path, help="file for the findings, as JSON")


def _add_retention(stages: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "remove the resumable state of trainings that are finished for long, here and in the mirror"
    retention = stages.add_parser("retention", help=text, description=text.capitalize() + ".")
    retention.add_argument("--days", type=float, required=True, help="days since the end of a training")
    retention.add_argument("--rehearse", action="store_true", help="say what would be removed, and remove nothing")
    retention.add_argument("--report", type=Path, help="file for what was removed, as JSON")


def show(params: Path) -> None:
    """Prints every parameter of a training and the numbers that follow from them."""
    config, launch = load_config("train", params), load_config("launch", params)
    for key, value in {**to_flat_dict(config), **to_flat_dict(launch)}.items():
        print(f"{key:32}{value}")
    print(f"\n{BatchArithmetic(config=config, num_processes=launch.launch.world_size).explain()}")


def prepare() -> None:
    """Sets up logging; other ranks than the first only warn, and other libraries would bury the line per update."""
    level = logging.INFO if is_first_rank() else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
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
            print(f"stopped: {error}", file=sys.stderr)
        return ExitStatus.RESUMABLE
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitStatus.WRONG_CONFIGURATION
    except (SfgrpoError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
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


def promote(chosen: argparse.Namespace) -> None:
    """Judges a candidate, or applies what an earlier call decided."""
    if chosen.apply and (chosen.model or chosen.version):
        raise ConfigError("--apply RUN is about the version that was judged; leave --model and --version out")
    config = None if chosen.apply else load_config("promote", chosen.params)
    environment = read_environment()
    from sfgrpo import promoting

    if config is None:
        promoting.apply(environment, chosen.apply)
        return
    promoting.promote(config, environment, model=chosen.model, number=chosen.version, judge_only=chosen.judge_only)


def of_champion(chosen: argparse.Namespace) -> None:
    """Rolls the champion back, or rechecks it; reads parameters only for the name of the model."""
    model = chosen.model or load_config("rollback", chosen.params).registry.model_name
    environment = read_environment()
    from sfgrpo import promoting

    verb = promoting.rollback if chosen.stage == "rollback" else promoting.recheck
    verb(environment, model)


def sample(chosen: argparse.Namespace) -> None:
    """Draws one image by a registered version."""
    environment = read_environment()
    from sfgrpo import promoting

    given = {"seed": chosen.seed, "num_inference_steps": chosen.steps, "guidance_scale": chosen.guidance}
    params = {name: value for name, value in given.items() if value is not None}
    promoting.sample(environment, chosen.model, chosen.prompt, chosen.out, params)


def sweep(quiet_h: float, report: Path | None) -> None:
    """Ends the runs of dead processes, and says which runs look dead."""
    environment = read_environment()
    from sfgrpo.sweep import sweep_runs

    found = sweep_runs(environment, quiet_h * 3600)
    if report is not None:
        found.write(report)
    for run in found.closed:
        print(f"closed {run.name}: {run.owner} is gone")
    for run in found.silent:
        print(
            f"silent {run.name}: no record for {run.silent_s / 3600:.1f} h from {run.owner}, which cannot be seen here"
        )
    print(f"runs at work {len(found.at_work)}, closed {len(found.closed)}, silent {len(found.silent)}")


def retention(days: float, rehearse: bool, report: Path | None) -> None:
    """Removes what finished trainings left, and says what that was."""
    environment = read_environment()
    from sfgrpo.retention import remove_finished

    done = remove_finished(environment, days, rehearsal=rehearse)
    if report is not None:
        done.write(report)
    word = "would remove" if rehearse else "removed"
    for removed in done.removed:
        print(f"{word} {removed.place}: {removed.num_bytes / 1e6:.1f} MB")
    print(f"{word} {len(done.removed)} places, {sum(each.num_bytes for each in done.removed) / 1e6:.1f} MB in all")


def main(arguments: list[str] | None = None) -> int:
    """Runs one stage and returns the exit status."""
    chosen = _parser().parse_args(arguments)
    prepare()
    commands: dict[str, Callable[[], None]] = {
        "show": lambda: show(chosen.params),
        "train": lambda: train(chosen.params, chosen.resume),
        "promote": lambda: promote(chosen),
        "rollback": lambda: of_champion(chosen),
        "recheck": lambda: of_champion(chosen),
        "sample": lambda: sample(chosen),
        "sweep": lambda: sweep(chosen.quiet_h, chosen.report),
        "retention": lambda: retention(chosen.days, chosen.rehearse, chosen.report),
    }
    return guarded(commands.get(chosen.stage, lambda: run(chosen.stage, chosen.params)))


if __name__ == "__main__":
    sys.exit(main())
