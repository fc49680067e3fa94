"""The command line `python -m sfgrpo`: every command with its options and what it runs.

A command imports what it needs when it runs, so that help and wrong parameters appear before anything heavy loads.
"""

from __future__ import annotations

import argparse
import dataclasses
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic

from sfgrpo.config import ranges, stages
from sfgrpo.config.batching import BatchArithmetic
from sfgrpo.config.stages import load_config, to_flat_dict
from sfgrpo.errors import ConfigError
from sfgrpo.paths import PARAMS
from sfgrpo.runtime.entry_point import run_guarded, set_up_logging
from sfgrpo.runtime.environment import Environment, read_environment
from sfgrpo.runtime.rank import die_with_launcher, is_rank
from sfgrpo.runtime.shutdown import LAUNCHER_MARGIN_S, RANKS_STOPPED, GracefulShutdown

SILENT_H = 1.0
"""An update of the largest model takes minutes; a run that records nothing for this long looks dead."""
RENAMED = {"sweep": "close-stale-runs"}
"""Former names of commands."""

Run = Callable[[argparse.Namespace, Environment], None]


def _stage(schema: type[stages.Stage], function: str) -> Run:
    """Return a command that calls `function` of `sfgrpo.commands` with its configuration and the environment."""

    def run(args: argparse.Namespace, environment: Environment) -> None:
        config = load_config(schema, args.params)
        pkgutil.resolve_name(f"sfgrpo.commands.{function}")(config, environment)

    return run


def _on_model(function: str) -> Run:
    """Return a command that calls `function` of `sfgrpo.commands` with the environment and a model name."""

    def run(args: argparse.Namespace, environment: Environment) -> None:
        model = args.model or load_config(stages.RegistryStage, args.params).registry.model_name
        pkgutil.resolve_name(f"sfgrpo.commands.{function}")(environment, model)

    return run


def _train(args: argparse.Namespace, environment: Environment) -> None:
    """Train in this process, or launch the ranks that do; a resumed run takes `launch` alone from `--params`."""
    if args.accept_code_change and args.resume is None:
        raise ConfigError("--accept-code-change is about a run that is resumed; name it by --resume RUN")
    launch = load_config(stages.LaunchStage, args.params).launch
    if is_rank():
        die_with_launcher()
    from sfgrpo.training.run import find_inputs, train_policy

    inputs = None if args.resume is None else find_inputs(args.resume, environment)
    config = load_config(stages.TrainStage, args.params if inputs is None else inputs / PARAMS)
    if is_rank() or launch.world_size == 1:
        train_policy(config, environment, launch, inputs, accept_code_change=args.accept_code_change)
        return
    BatchArithmetic(config=config, num_processes=launch.world_size)
    with GracefulShutdown(environment.grace_s + LAUNCHER_MARGIN_S, RANKS_STOPPED) as shutdown:
        from sfgrpo.runtime.launcher import launch_ranks

        launch_ranks(launch, environment, ["-m", "sfgrpo", *args.arguments], shutdown)


def _evaluate_snapshot(args: argparse.Namespace, environment: Environment) -> None:
    from sfgrpo.commands.evaluate_snapshot import evaluate_snapshot

    evaluate_snapshot(args.folder, args.update, environment)


def _promote(args: argparse.Namespace, environment: Environment) -> None:
    if args.apply is not None and (args.model or args.version is not None):
        raise ConfigError("--apply RUN is about the version that was compared; leave --model and --version out")
    config = None if args.apply is not None else load_config(stages.PromoteStage, args.params)
    from sfgrpo.commands import promote

    if config is None:
        promote.apply(environment, args.apply)
    else:
        promote.promote(config, environment, model=args.model, number=args.version, judge_only=args.judge_only)


def _sample(args: argparse.Namespace, environment: Environment) -> None:
    from sfgrpo.commands.sample import sample

    given = {"seed": args.seed, "num_inference_steps": args.steps, "guidance_scale": args.guidance}
    params = {name: value for name, value in given.items() if value is not None}
    sample(environment, args.model, args.prompt, args.out, params)


def _download(args: argparse.Namespace, environment: Environment) -> None:
    from sfgrpo.commands.download import download

    download(environment, args.model, args.out)


def _close_stale_runs(args: argparse.Namespace, environment: Environment) -> None:
    from sfgrpo.commands.close_stale_runs import close_stale_runs

    close_stale_runs(environment, args.quiet_h * 3600, args.report)


def _relocate(_: argparse.Namespace, environment: Environment) -> None:
    from sfgrpo.commands.relocate import relocate_store

    relocate_store(environment)


def _retention(args: argparse.Namespace, environment: Environment) -> None:
    from sfgrpo.commands.retention import retention

    retention(environment, args.days, args.report, rehearsal=args.rehearse)


def _show(args: argparse.Namespace, _: Environment) -> None:
    config, launch = load_config(stages.TrainStage, args.params), load_config(stages.LaunchStage, args.params)
    for key, value in {**to_flat_dict(config), **to_flat_dict(launch)}.items():
        print(f"{key:32}{value}")
    print(f"\n{BatchArithmetic(config=config, num_processes=launch.launch.world_size).explain()}")


def _doctor(args: argparse.Namespace, environment: Environment) -> None:
    from sfgrpo.commands.doctor import doctor

    doctor(args.params, environment)


def _study(args: argparse.Namespace, environment: Environment) -> None:
    from sfgrpo.study.config import load_plan

    plan = load_plan(args.preset)
    if args.action == "report":
        from sfgrpo.study.report import write_report

        write_report(plan, environment)
    else:
        from sfgrpo.study.run import train_run

        train_run(plan, args.row, args.seed, environment)


def _allowed(kind: Any) -> Callable[[str], Any]:
    """Return what reads the value of an option, and refuses those that `kind`, a type of a parameter, does not hold."""
    adapter: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(kind)

    def read(text: str) -> Any:
        try:
            return adapter.validate_python(text)
        except pydantic.ValidationError as error:
            problem = error.errors()[0]
            reason = problem["msg"].removeprefix("Value error, ")
            shown = "" if problem["type"] == "value_error" else f"{text[:40]!r}: "
            raise argparse.ArgumentTypeError(f"{shown}{reason}") from error

    return read


def _add_nothing(_: argparse.ArgumentParser) -> None:
    """Add no option."""


def _add_params_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--params", type=Path, default=Path(PARAMS), help="parameter file (%(default)s)")


def _add_train_arguments(parser: argparse.ArgumentParser) -> None:
    _add_params_argument(parser)
    help_text = "go on with this run, with its own parameters and prompts"
    parser.add_argument("--resume", type=_allowed(ranges.RunName), metavar="RUN", help=help_text)
    parser.add_argument(
        "--accept-code-change", action="store_true", help="go on with a run of other code, as a new run of its own name"
    )


def _add_snapshot_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER", help="folder of the training's state")
    help_text = "number of updates that the snapshot has seen"
    parser.add_argument("update", type=_allowed(ranges.CountOrZero), metavar="UPDATE", help=help_text)


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    _add_params_argument(parser)
    help_text = "registered model (registry.model_name)"
    parser.add_argument("--model", type=_allowed(ranges.ModelName), metavar="NAME", help=help_text)


def _add_promote_arguments(parser: argparse.ArgumentParser) -> None:
    _add_model_arguments(parser)
    help_text = "candidate (the version with registry.alias)"
    parser.add_argument("--version", type=_allowed(ranges.VersionNumber), metavar="N", help=help_text)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--judge-only", action="store_true", help="decide and record, but move no alias")
    help_text = "move the aliases as decided in this MLflow run"
    mode.add_argument("--apply", type=_allowed(ranges.RunId), metavar="RUN", help=help_text)


def _add_address_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="ADDRESS", help="models:/NAME@ALIAS or models:/NAME/NUMBER")


def _add_download_arguments(parser: argparse.ArgumentParser) -> None:
    _add_address_argument(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new folder for the version")


def _add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="text to sample an image for")
    _add_address_argument(parser)
    parser.add_argument("--out", type=Path, default=Path("sample.png"), help="PNG file to write (%(default)s)")
    for option, kind, help_text in (
        ("--seed", ranges.Seed, "seed of the start noise (the version's)"),
        ("--steps", ranges.StepCount, "denoising steps (the version's)"),
        ("--guidance", ranges.Guidance, "classifier-free guidance weight (the version's)"),
    ):
        parser.add_argument(option, type=_allowed(kind), help=help_text)


def _add_stale_arguments(parser: argparse.ArgumentParser) -> None:
    help_text = "hours without a record (%(default)g)"
    parser.add_argument("--quiet-h", type=_allowed(ranges.Duration), default=SILENT_H, help=help_text)
    parser.add_argument("--report", type=Path, help="JSON file for the findings")


def _add_retention_arguments(parser: argparse.ArgumentParser) -> None:
    help_text = "days since the end of a training"
    parser.add_argument("--days", type=_allowed(ranges.Duration), required=True, help=help_text)
    parser.add_argument("--rehearse", action="store_true", help="print what would be removed, and remove nothing")
    parser.add_argument("--report", type=Path, help="JSON file that lists what was removed")


def _add_study_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    run = actions.add_parser("run", help="train one row with one seed; resumes an interrupted run")
    report = actions.add_parser("report", help="write the report on all finished runs")
    for action in (run, report):
        action.add_argument("preset", metavar="PRESET", help="preset of experiments/study.yaml, such as short")
    run.add_argument("row", metavar="ROW", help="parameter file in experiments/shapes, without its ending")
    run.add_argument("seed", type=_allowed(ranges.Seed), metavar="SEED", help="seed of the run")


@dataclasses.dataclass(frozen=True, slots=True)
class Command:
    """One word after `python -m sfgrpo`."""

    help: str
    run: Run
    add_arguments: Callable[[argparse.ArgumentParser], None] = _add_params_argument


COMMANDS: Mapping[str, Command] = {
    "pretrain": Command(
        "train the shapes base model, which ships trained (most of an hour on two cores)",
        _stage(stages.PretrainStage, "pretrain:pretrain"),
    ),
    "pretrain-reward": Command(
        "train the shapes world's CLIP, a reward model, which ships trained (some 15 minutes)",
        _stage(stages.PretrainRewardStage, "pretrain:pretrain_reward"),
    ),
    "prompts": Command(
        "write the training and evaluation prompts to data/prompts", _stage(stages.PromptsStage, "prompts:prompts")
    ),
    "train": Command("train the adapter, or resume an interrupted training", _train, _add_train_arguments),
    "evaluate": Command(
        "compare base model, last and best adapter on GenEval", _stage(stages.EvaluateStage, "evaluate:evaluate")
    ),
    "evaluate-snapshot": Command(
        "evaluate a snapshot of a training, finished or not", _evaluate_snapshot, _add_snapshot_arguments
    ),
    "register": Command(
        "register the trained policy as a model version in MLflow", _stage(stages.RegisterStage, "register:register")
    ),
    "promote": Command(
        "compare a version with the champion, and make it champion if it is better", _promote, _add_promote_arguments
    ),
    "rollback": Command(
        "make the previous champion champion again", _on_model("promote:rollback"), _add_model_arguments
    ),
    "recheck": Command(
        "evaluate the champion again and report drift", _on_model("recheck:recheck"), _add_model_arguments
    ),
    "sample": Command("sample one image from a registered version into a PNG file", _sample, _add_sample_arguments),
    "download": Command("copy a registered version to a folder, verified", _download, _add_download_arguments),
    "close-stale-runs": Command(
        "end MLflow runs whose process on this machine died, and list silent ones of other machines",
        _close_stale_runs,
        _add_stale_arguments,
    ),
    "retention": Command(
        "remove the resumable state of trainings that finished long ago, here and in the mirror",
        _retention,
        _add_retention_arguments,
    ),
    "relocate": Command(
        "correct the addresses of artifacts in mlflow.db after its folder was moved or copied", _relocate, _add_nothing
    ),
    "study": Command("train a row of the study, or write its report", _study, _add_study_arguments),
    "doctor": Command("check machine, services, models and parameters, and say how to cure what is wrong", _doctor),
    "show": Command("print all parameters and the batch arithmetic of a training", _show),
}
"""All commands by name, those of the pipeline in its order; `_` may be typed for `-`."""


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sfgrpo",
        description="Fine-tunes flow-matching text-to-image models with Stepwise-Flow-GRPO, one stage at a time.",
        epilog="The stages run in the order prompts, train, evaluate, register; `dvc repro` runs the first three, "
        "`make demo` all four. Parameters are in params.yaml. Settings of the machine are environment variables: "
        "MLFLOW_TRACKING_URI, MLFLOW_RUN_ID, SFGRPO_SCRATCH, SFGRPO_MIRROR (S3 bucket that keeps a copy of every run), "
        "SFGRPO_S3_ENCRYPTION, SFGRPO_DEVICE, SFGRPO_EVALUATION_DEVICE, SFGRPO_NUM_THREADS, SFGRPO_TIMEOUT_S and "
        "SFGRPO_GRACE_S; flows set SFGRPO_FLOW_RUN_ID, SFGRPO_FLOW_RUN_URL and SFGRPO_BRANCH, and read "
        "SFGRPO_DVC_REMOTE; the nodes of a training meet at torchrun's PET_RDZV_ENDPOINT, under PET_RDZV_ID. SIGTERM, "
        "SIGUSR1 and Ctrl-C make a training save its state and stop. "
        "Exit status: 0 done, 1 failed, 2 wrong configuration, 75 stopped and resumable.",
    )
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        description = f"{command.help[0].upper()}{command.help[1:]}."
        subparser = parsers.add_parser(name, help=command.help, description=description)
        subparser.set_defaults(run=command.run)
        command.add_arguments(subparser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    given, parser = list(sys.argv[1:] if arguments is None else arguments), _make_parser()
    if given and given[0] in RENAMED:
        parser.error(f"the command {given[0]} is now {RENAMED[given[0]]}; use that name")
    # Stages of DVC, and with them their commands, are spelt like the sections of params.yaml.
    given[:1] = [name.replace("_", "-") for name in given[:1]]
    args = parser.parse_args(given, argparse.Namespace(arguments=given))
    set_up_logging()
    return run_guarded(lambda: args.run(args, read_environment()))
