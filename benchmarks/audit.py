"""Audit what GenEval calls correct, by eye: `python -m benchmarks.audit draw FOLDER...`, then `... report`.

`draw` takes folders in which the demo was evaluated, such as those of `benchmarks.demo`, and draws images that are
framed correct at random by a seed, over all folders and tasks. A person looks at the sheets and writes `"ok": true` or
`"ok": false` into every line of `audit.jsonl`, with a `note` where there is something to say. `report` prints the share
that is right and draws the sheets again, with these verdicts as frames.
"""

from __future__ import annotations

import argparse
import json
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.sheets import GREEN, RED, Cell, SheetStyle, save_sheets
from benchmarks.tiles import read_tiles, write_tiles
from sfgrpo.config.loading import as_config_error
from sfgrpo.errors import ConfigError, MismatchError
from sfgrpo.evaluation.identity import EVALUATED
from sfgrpo.geneval.metadata import prompt_from_metadata
from sfgrpo.paths import EVALUATE_REPORT, EVALUATION_PROMPTS
from sfgrpo.prompts import prompts_digest, read_prompts
from sfgrpo.rewards import build_reward, checked_rewards
from sfgrpo.runtime.entry_point import run_guarded
from sfgrpo.runtime.files import atomic_write
from sfgrpo.runtime.lines import read_lines
from sfgrpo.types import TAGS, Prompt

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "data/shapes_audit"
SHEETS = ROOT / "docs/images/audit"
IMAGES, AUDIT = "images.png", "audit.jsonl"
NUM_IMAGES, SEED = 100, 0
STYLE = SheetStyle(columns=5, text="below", text_size=5)
PER_SHEET = 25
KEYS = ("number", "run", "model", "position", "image", "metadata", "ok", "note")

Candidate = tuple[dict[str, Any], NDArray[np.uint8]]
"""A record without number and verdict, and its image [32, 32, 3]."""


def framed_images(folder: Path, model: str) -> Iterator[Candidate]:
    """Yield all images of a model that the detector of this checkout calls correct, in the order of their evaluation.

    Args:
        folder: a working folder with `reports/evaluate/images.tar` and the evaluation prompts.
        model: name of the model's folder in the tar: `base`, `last` or `policy`, the best adapter.

    Raises:
        ConfigError: a file is absent, or holds no image of the model.
        MismatchError: the prompts are not those of the evaluation.
    """
    prompts = read_prompts(folder / EVALUATION_PROMPTS, "run `python -m sfgrpo prompts` there, or name another folder")
    _require_prompts_of(folder, prompts)
    places, images = _read_archive(folder / EVALUATE_REPORT / "images.tar", model)
    asked = [prompts[position] for position, _ in places]
    verdicts = checked_rewards(build_reward("geneval_correct"), images, asked).numpy()
    for (position, index), image, verdict in zip(places, images, verdicts, strict=True):
        if verdict == 1.0:
            record = {"run": folder.resolve().name, "model": model, "position": position, "image": index}
            yield record | {"metadata": prompts[position].to_metadata()}, image


def draw_audit(candidates: Sequence[Candidate], out: Path, sheets: Path, number: int, seed: int) -> list[Path]:
    """Draw `number` of the candidates at random, without replacement, and write their images, records and sheets.

    Raises:
        ConfigError: there are fewer candidates, or `out` holds verdicts already.
    """
    if len(candidates) < number:
        raise ConfigError(f"--images: {len(candidates)} images are framed correct, fewer than {number}; lower it")
    if (out / AUDIT).exists() and (judged := [each for each in read_audit(out) if each["ok"] is not None]):
        raise ConfigError(f"{out / AUDIT} holds {len(judged)} verdicts, which would be lost; name another --out")
    chosen = sorted(np.random.default_rng(seed).choice(len(candidates), size=number, replace=False))
    records = [{"number": place, **candidates[row][0], "ok": None, "note": ""} for place, row in enumerate(chosen)]
    write_tiles(out / IMAGES, np.stack([candidates[row][1] for row in chosen]))
    atomic_write(out / AUDIT, "".join(f"{json.dumps(record)}\n" for record in records))
    return draw_sheets(out, records, sheets)


def read_audit(folder: Path) -> list[dict[str, Any]]:
    """Read the records of an audit.

    Raises:
        ConfigError: the file is absent, or a line is no record; the message starts with path and line number.
    """
    records: list[dict[str, Any]] = []
    for number, line in read_lines(folder / AUDIT, "draw one by `python -m benchmarks.audit draw FOLDER`"):
        with as_config_error(f"{folder / AUDIT}:{number}"):
            records.append(_parse_line(line, len(records)))
    return records


def draw_sheets(folder: Path, records: Sequence[Mapping[str, Any]], sheets: Path) -> list[Path]:
    """Draw the sheets of an audit; an image with a verdict has a frame, green where it is right and else red."""
    tiles = read_tiles(folder / IMAGES, len(records), "draw the audit again")
    frames = {True: GREEN, False: RED, None: None}
    cells = [
        Cell(image=tile, title=str(record["number"]), lines=[record["metadata"]["prompt"]], frame=frames[record["ok"]])
        for tile, record in zip(tiles, records, strict=True)
    ]
    return save_sheets(cells, STYLE, PER_SHEET, sheets, "audit")


def report(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the shares that are right to the eye, over all and for every task, and what is wrong, as Markdown.

    Raises:
        ConfigError: a record has no verdict.
    """
    if missing := [record["number"] for record in records if record["ok"] is None]:
        raise ConfigError(
            f"{AUDIT}: {len(missing)} of {len(records)} images have no verdict, the first is {missing[0]}; write true "
            'or false as "ok"'
        )
    lines = ["| Task | Framed correct | Right to the eye | Share |", "|---|---:|---:|---:|"]
    for name in ("all", *TAGS):
        verdicts = [record["ok"] for record in records if name in ("all", record["metadata"]["tag"])]
        share = f"{sum(verdicts) / len(verdicts):.2f}" if verdicts else "-"
        lines.append(f"| {name} | {len(verdicts)} | {sum(verdicts)} | {share} |")
    wrong = [record for record in records if not record["ok"]]
    lines += ["", *(f"- {each['number']}, {each['metadata']['prompt']!r}: {each['note'] or 'wrong'}" for each in wrong)]
    return "\n".join(lines).rstrip() + "\n"


def _require_prompts_of(folder: Path, prompts: Sequence[Prompt]) -> None:
    path = folder / EVALUATE_REPORT / "metrics.json"
    try:
        named = json.loads(path.read_text(encoding="utf-8"))[EVALUATED]["prompts_sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path} is no report ({error}); run `python -m sfgrpo evaluate` there") from error
    if named != (found := prompts_digest(prompts)):
        raise MismatchError(
            f"{folder / EVALUATION_PROMPTS} has the digest {found}, and {path} is of {named}; evaluate again there"
        )


def _read_archive(path: Path, model: str) -> tuple[list[tuple[int, int]], NDArray[np.uint8]]:
    """Read the images of a model, with the position of the prompt and the number of each, in their order."""
    found: dict[tuple[int, int], NDArray[np.uint8]] = {}
    with tarfile.open(path) as tar:
        names = tar.getnames()
        for name in names:
            folder, prompt, file = name.split("/")
            if folder == model and (content := tar.extractfile(name)) is not None:
                with Image.open(content) as image:
                    found[int(prompt.partition("-")[0]), int(file.removesuffix(".png"))] = np.asarray(image)
    if not found:
        models = ", ".join(dict.fromkeys(name.split("/")[0] for name in names))
        raise ConfigError(f"--model: {path} has no images of {model!r}; it has those of {models}")
    return sorted(found), np.stack([found[place] for place in sorted(found)])


def _parse_line(line: str, number: int) -> dict[str, Any]:
    """Read one record; raise `ValueError` for anything else."""
    record = json.loads(line)
    if not isinstance(record, dict) or set(record) != set(KEYS):
        raise ValueError(f"{line[:80]} is no record; write an object with {', '.join(KEYS)}")
    if record["number"] != number:
        raise ValueError(f"number: {record['number']!r} stands where {number} should; keep all lines, in order")
    if record["ok"] is not None and not isinstance(record["ok"], bool):
        raise ValueError(f"ok: {record['ok']!r} is no verdict; write true, false or null")
    if not isinstance(record["note"], str):
        raise ValueError(f"note: {record['note']!r} is no text")
    prompt_from_metadata(record["metadata"])
    return record


def _number(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 10000:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no number of images; give one from 1 to 10000")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no seed; give a whole number from 0")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw an audit, or report one; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit", description=str(__doc__).split("\n\n")[0])
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    draw = actions.add_parser("draw", help="draw images that are framed correct, and their sheets")
    draw.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="where the demo was evaluated")
    draw.add_argument("--model", default="policy", help="base, last, or policy, the best adapter (%(default)s)")
    draw.add_argument("--images", type=_number, default=NUM_IMAGES, metavar="N", help="how many (%(default)s)")
    draw.add_argument("--seed", type=_seed, default=SEED, help="seed of the draw (%(default)s)")
    done = actions.add_parser("report", help="print the share that is right, and draw the sheets with the verdicts")
    for action in (draw, done):
        action.add_argument("--out", type=Path, default=FOLDER, metavar="FOLDER", help="data set (%(default)s)")
        action.add_argument("--sheets", type=Path, default=SHEETS, metavar="FOLDER", help="sheets (%(default)s)")
    chosen: Any = parser.parse_args(arguments)

    def run() -> None:
        if chosen.action == "draw":
            candidates = [each for folder in chosen.folders for each in framed_images(folder, chosen.model)]
            files = draw_audit(candidates, chosen.out, chosen.sheets, chosen.images, chosen.seed)
            print(f"{chosen.images} of {len(candidates)} images framed correct; write verdicts to {chosen.out / AUDIT}")
        else:
            records = read_audit(chosen.out)
            print(report(records))
            files = draw_sheets(chosen.out, records, chosen.sheets)
        print("\n".join(map(str, files)))

    return run_guarded(run)


if __name__ == "__main__":
    sys.exit(main())
