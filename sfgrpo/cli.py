"""The commands of `python -m sfgrpo`: what each is for, its options, and what it calls.

What a command needs is imported when it runs, so that help and wrong parameters are told before anything loads.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from sfgrpo.config.batching import BatchArithmetic
from sfgrpo.config.stages import load_config, to_flat_dict
from sfgrpo.errors import ConfigError, ExitStatus, Preempted, SfgrpoError
from sfgrpo.paths import PARAMS
from sfgrpo.runtime.environment import read_environment
from sfgrpo.runtime.rank import die_with_launcher, is_first_rank, is_rank, noting_errors
from sfgrpo.runtime.redaction import SecretFreeFormatter, print_error, without_secrets
from sfgrpo.runtime.shutdown import LAUNCHER_MARGIN_S, GracefulShutdown

QUIET_H = 1.0
"""An update of the largest model takes minutes; a run that records nothing for so long looks dead."""


def run_stage(chosen: argparse.Namespace) -> None:
    """Runs one stage of the pipeline other than the training."""
    config = load_config(chosen.command, chosen.params)
    environment = read_environment()
    from sfgrpo.commands.evaluate import evaluate
    from sfgrpo.commands.pretrain import pretrain, pretrain_reward
    from sfgrpo.commands.prompts import prompts
    from sfgrpo.commands.register import register

    stages: dict[str, Callable[..., None]] = {
        "pretrain": pretrain,
        "pretrain_reward": pretrain_reward,
        "prompts": prompts,
        "evaluate": evaluate,
        "register": register,
    }
    stages[chosen.command](config, environment)


def train(chosen: argparse.Namespace) -> None:
    """Trains in this process or, where there are to be several, as their launcher or as one of them.

    By the parameters, unless it is to go on with a run that has its own.
    """
    params, run_name = chosen.params, chosen.resume
    launch = load_config("launch", params).launch
    environment = read_environment()
    if is_rank():
        die_with_launcher()
    from sfgrpo.training.run import find_inputs, train_policy

    inputs = None if run_name is None else find_inputs(run_name, environment)
    config = load_config("train", params if inputs is None else inputs / PARAMS)
    if not is_rank():
        BatchArithmetic(config=config, num_processes=launch.world_size)
    if is_rank() or launch.world_size == 1:
        train_policy(config, environment, launch, inputs)
        return
    command = ["-m", "sfgrpo", "train", "--params", str(params), *(() if run_name is None else ("--resume", run_name))]
    with GracefulShutdown(environment.grace_s + LAUNCHER_MARGIN_S) as shutdown:
        from sfgrpo.runtime.launcher import launch_ranks

        launch_ranks(launch, environment, command, shutdown)


def evaluate_snapshot(chosen: argparse.Namespace) -> None:
    """Judges one snapshot of a training, by that training's own parameters."""
    environment = read_environment()
    from sfgrpo.commands.evaluate_snapshot import evaluate_snapshot

    evaluate_snapshot(chosen.folder, chosen.update, environment)


def promote(chosen: argparse.Namespace) -> None:
    """Judges a candidate, or applies what an earlier call decided."""
    if chosen.apply and (chosen.model or chosen.version):
        raise ConfigError("--apply RUN is about the version that was judged; leave --model and --version out")
    config = None if chosen.apply else load_config("promote", chosen.params)
    environment = read_environment()
    from sfgrpo.commands import promote

    if config is None:
        promote.apply(environment, chosen.apply)
        return
    promote.promote(config, environment, model=chosen.model, number=chosen.version, judge_only=chosen.judge_only)


def of_champion(chosen: argparse.Namespace) -> None:
    """Rolls the champion back, or rechecks it; reads parameters only for the name of the model."""
    model = chosen.model or load_config("rollback", chosen.params).registry.model_name
    environment = read_environment()
    from sfgrpo.commands.promote import rollback
    from sfgrpo.commands.recheck import recheck

    verb = rollback if chosen.command == "rollback" else recheck
    verb(environment, model)


def sample(chosen: argparse.Namespace) -> None:
    """Draws one image by a registered version."""
    environment = read_environment()
    from sfgrpo.commands.sample import sample

    given = {"seed": chosen.seed, "num_inference_steps": chosen.steps, "guidance_scale": chosen.guidance}
    params = {name: value for name, value in given.items() if value is not None}
    sample(environment, chosen.model, chosen.prompt, chosen.out, params)


def sweep(chosen: argparse.Namespace) -> None:
    """Ends the runs of dead processes, and says which runs look dead."""
    environment = read_environment()
    from sfgrpo.tracking.stale_runs import sweep_runs

    found = sweep_runs(environment, chosen.quiet_h * 3600)
    if chosen.report is not None:
        found.write(chosen.report)
    for run in found.closed:
        print(f"closed {run.name}: {run.owner} is gone")
    for run in found.silent:
        print(
            f"silent {run.name}: no record for {run.silent_s / 3600:.1f} h from {run.owner}, which cannot be seen here"
        )
    print(f"runs at work {len(found.at_work)}, closed {len(found.closed)}, silent {len(found.silent)}")


def retention(chosen: argparse.Namespace) -> None:
    """Removes what finished trainings left, and says what that was."""
    environment = read_environment()
    from sfgrpo.storage.retention import remove_finished

    done = remove_finished(environment, chosen.days, rehearsal=chosen.rehearse)
    if chosen.report is not None:
        done.write(chosen.report)
    word = "would remove" if chosen.rehearse else "removed"
    for removed in done.removed:
        print(f"{word} {removed.place}: {removed.num_bytes / 1e6:.1f} MB")
    print(f"{word} {len(done.removed)} places, {sum(each.num_bytes for each in done.removed) / 1e6:.1f} MB in all")


def show(chosen: argparse.Namespace) -> None:
    """Prints every parameter of a training and the numbers that follow from them."""
    config, launch = load_config("train", chosen.params), load_config("launch", chosen.params)
    for key, value in {**to_flat_dict(config), **to_flat_dict(launch)}.items():
        print(f"{key:32}{value}")
    print(f"\n{BatchArithmetic(config=config, num_processes=launch.launch.world_size).explain()}")


def study(chosen: argparse.Namespace) -> None:
    """Train one run of the study, or write its report."""
    from sfgrpo.study.config import load_plan

    plan, environment = load_plan(chosen.preset), read_environment()
    if chosen.action == "report":
        from sfgrpo.study.report import write_report

        write_report(plan, environment)
        return
    from sfgrpo.study.run import train_run

    train_run(plan, chosen.row, chosen.seed, environment)


def take_params(parser: argparse.ArgumentParser) -> None:
    """Adds the option that all commands have which read parameters."""
    parser.add_argument("--params", type=Path, default=Path(PARAMS), help="parameter file (%(default)s)")


def _take_run(parser: argparse.ArgumentParser) -> None:
    take_params(parser)
    parser.add_argument("--resume", metavar="RUN", help="go on with this run, by its own parameters and prompts")


def _take_snapshot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER", help="folder of the training's state")
    parser.add_argument("update", type=int, metavar="UPDATE", help="updates that the snapshot has seen")


def _take_model(parser: argparse.ArgumentParser) -> None:
    take_params(parser)
    parser.add_argument("--model", metavar="NAME", help="registered model (registry.model_name)")


def _take_candidate(parser: argparse.ArgumentParser) -> None:
    _take_model(parser)
    parser.add_argument("--version", type=int, metavar="N", help="candidate (the version with the alias of registry)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--judge-only", action="store_true", help="decide and record, but move no alias")
    form.add_argument("--apply", metavar="RUN", help="move the aliases as an earlier call decided, by its MLflow run")


def _take_sample(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="what to draw")
    parser.add_argument("--model", required=True, metavar="ADDRESS", help="models:/NAME@ALIAS or models:/NAME/NUMBER")
    parser.add_argument("--out", type=Path, default=Path("sample.png"), help="PNG file to write (%(default)s)")
    parser.add_argument("--seed", type=int, help="of the start noise (the version's)")
    parser.add_argument("--steps", type=int, help="denoising steps (the version's)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance weight (the version's)")


def _take_silence(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet-h", type=float, default=QUIET_H, help="hours without a record (%(default)g)")
    parser.add_argument("--report", type=Path, help="file for the findings, as JSON")


def _take_age(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--days", type=float, required=True, help="days since the end of a training")
    parser.add_argument("--rehearse", action="store_true", help="say what would be removed, and remove nothing")
    parser.add_argument("--report", type=Path, help="file for what was removed, as JSON")


def _take_study(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    run = actions.add_parser("run", help="train one row with one seed; resumes an interrupted run")
    report = actions.add_parser("report", help="write the report on all finished runs")
    for action in (run, report):
        action.add_argument("preset", metavar="PRESET", help="preset of experiments/study.yaml, such as short")
    run.add_argument("row", metavar="ROW", help="parameter file in experiments/shapes, without its ending")
    run.add_argument("seed", type=int, metavar="SEED", help="seed of the run")


@dataclasses.dataclass(frozen=True, slots=True)
class Command:
    """One word after `python -m sfgrpo`."""

    help: str
    run: Callable[[argparse.Namespace], None]
    take: Callable[[argparse.ArgumentParser], None] = take_params
    """Adds the options."""


COMMANDS: Mapping[str, Command] = {
    "pretrain": Command(
        "train the shapes base model from scratch (most of an hour on two cores; it ships trained)", run_stage
    ),
    "pretrain_reward": Command(
        "train the shapes world's CLIP, a reward model (some 15 minutes; it ships trained)", run_stage
    ),
    "prompts": Command("write the training and evaluation prompts to data/prompts", run_stage),
    "train": Command("train the adapter by Stepwise-Flow-GRPO; resumes an interrupted run by itself", train, _take_run),
    "evaluate": Command("judge base model and trained policy by GenEval, before and after", run_stage),
    "evaluate_snapshot": Command(
        "judge a snapshot of a training that may still go on, unless that was done", evaluate_snapshot, _take_snapshot
    ),
    "register": Command("register the trained policy as a model version in MLflow", run_stage),
    "promote": Command(
        "judge a registered version against the champion, and make it champion if it is better",
        promote,
        _take_candidate,
    ),
    "rollback": Command("make the champion before the present one champion again", of_champion, _take_model),
    "recheck": Command(
        "have the champion draw once more, and tell whether it still draws what it drew", of_champion, _take_model
    ),
    "sample": Command("draw one image by a registered version and write it as a PNG file", sample, _take_sample),
    "sweep": Command(
        "end the MLflow runs whose process on this machine is gone, and list silent ones of other machines",
        sweep,
        _take_silence,
    ),
    "retention": Command(
        "remove the resumable state of trainings that are finished for long, here and in the mirror",
        retention,
        _take_age,
    ),
    "study": Command("compare Stepwise-Flow-GRPO with Flow-GRPO; `make study` does it all", study, _take_study),
    "show": Command("print the resolved configuration and the batch arithmetic of a training", show),
}
"""All commands by their names; those of the pipeline come in its order."""


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
