"""The audit by eye: images that are framed correct, drawn by a seed, and verdicts that are read strictly."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import audit
from benchmarks.tiles import read_tiles
from sfgrpo.errors import ExitStatus
from sfgrpo.paths import EVALUATION_PROMPTS
from sfgrpo.prompts import prompts_digest, write_prompts
from sfgrpo.shapes.prompt_sets import all_prompts
from sfgrpo.shapes.world import render, sample_scene
from sfgrpo.tracking.image_archive import add_images

PER_PROMPT = 4
SPACES = all_prompts()
PROMPTS = [SPACES["single_object"][0], SPACES["counting"][0], SPACES["color_attr"][0], SPACES["position"][0]]


def evaluated(folder: Path, seed: int) -> Path:
    """Make a folder as after an evaluation, in which every image but the last of a prompt shows it."""
    generator = np.random.default_rng(seed)
    images = [
        render(sample_scene(prompt, generator) if index < PER_PROMPT - 1 else (), generator)
        for prompt in PROMPTS
        for index in range(PER_PROMPT)
    ]
    write_prompts(folder / EVALUATION_PROMPTS, PROMPTS)
    report = folder / "reports/evaluate"
    report.mkdir(parents=True)
    (report / "metrics.json").write_text(json.dumps({"evaluated": {"prompts_sha256": prompts_digest(PROMPTS)}}))
    with tarfile.open(report / "images.tar", "w") as tar:
        add_images(tar, "base", PROMPTS, PER_PROMPT, 0, np.zeros((16, 32, 32, 3), np.uint8))
        # The order of the tar is not that of the prompts.
        for first in (8, 0):
            add_images(tar, "policy", PROMPTS, PER_PROMPT, first, np.stack(images[first : first + 8]))
    return folder


@pytest.fixture
def folders(tmp_path) -> list[str]:
    return [str(evaluated(tmp_path / f"seed-{seed}", seed)) for seed in range(2)]


def draw(folders: list[str], out: Path, *options: str) -> int:
    return audit.main(["draw", *folders, "--out", str(out), "--sheets", str(out / "sheets"), *options])


def report(out: Path) -> int:
    return audit.main(["report", "--out", str(out), "--sheets", str(out / "sheets")])


def judge(out: Path, verdict) -> None:
    records = [json.loads(line) | {"ok": verdict(number)} for number, line in enumerate(lines_of(out))]
    (out / "audit.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))


def lines_of(out: Path) -> list[str]:
    return (out / "audit.jsonl").read_text().splitlines()


def test_candidates_are_the_images_that_are_framed_correct(folders):
    found = list(audit.framed_images(Path(folders[0]), "policy"))
    places = [(record["position"], record["image"]) for record, _ in found]
    assert places == [(position, image) for position in range(4) for image in range(PER_PROMPT - 1)]
    assert not list(audit.framed_images(Path(folders[0]), "base"))


def test_draw_keeps_image_and_record_together(folders, tmp_path):
    out = tmp_path / "audit"
    assert draw(folders, out, "--images", "10", "--seed", "3") == ExitStatus.DONE
    records = audit.read_audit(out)
    assert len({(record["run"], record["position"], record["image"]) for record in records}) == 10
    assert {record["run"] for record in records} == {"seed-0", "seed-1"}
    for tile, record in zip(read_tiles(out / "images.png", 10, ""), records, strict=True):
        prompt = PROMPTS[record["position"]]
        assert record["metadata"] == prompt.to_metadata() and record["ok"] is None
        name = f"policy/{record['position']:05d}-{prompt.tag}/{record['image']:03d}.png"
        with tarfile.open(tmp_path / record["run"] / "reports/evaluate/images.tar") as tar:
            content = tar.extractfile(name)
            assert content is not None
            with Image.open(content) as image:
                assert np.array_equal(np.asarray(image), tile)


def test_same_seed_draws_the_same_images(folders, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert draw(folders, tmp_path / name, "--images", "10", "--seed", seed) == ExitStatus.DONE
    first, again, other = (lines_of(tmp_path / name) for name in "abc")
    assert first == again != other


def test_report_gives_the_share_of_every_task_and_what_is_wrong(folders, tmp_path, capsys):
    out = tmp_path / "audit"
    draw(folders, out, "--images", "24")
    plain = (out / "sheets/audit_01.png").read_bytes()
    judge(out, lambda number: number not in (4, 5))
    assert report(out) == ExitStatus.DONE
    text = capsys.readouterr().out
    assert "| all | 24 | 22 | 0.92 |" in text
    assert "| counting | 6 | 4 | 0.67 |" in text
    assert "| colors | 0 | 0 | - |" in text
    assert f"- 4, {PROMPTS[1].text!r}: wrong" in text
    assert (out / "sheets/audit_01.png").read_bytes() != plain


def test_report_without_all_verdicts_is_refused(folders, tmp_path, capsys):
    out = tmp_path / "audit"
    draw(folders, out, "--images", "5")
    judge(out, lambda number: True if number < 3 else None)
    assert report(out) == ExitStatus.WRONG_CONFIGURATION
    assert '2 of 5 images have no verdict, the first is 3; write true or false as "ok"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ok": "yes"}, "ok: 'yes' is no verdict; write true, false or null"),
        ({"ok": 1}, "ok: 1 is no verdict"),
        ({"note": None}, "note: None is no text"),
        ({"number": 4}, "number: 4 stands where 0 should; keep all lines, in order"),
        ({"seen": 3}, "is no record; write an object with number, run"),
    ],
)
def test_record_that_was_spoilt_is_refused_with_its_line(folders, tmp_path, capsys, change, message):
    out = tmp_path / "audit"
    draw(folders, out, "--images", "2")
    first, second = lines_of(out)
    (out / "audit.jsonl").write_text(f"{json.dumps(json.loads(first) | change)}\n{second}\n")
    assert report(out) == ExitStatus.WRONG_CONFIGURATION
    error = capsys.readouterr().err
    assert "audit.jsonl:1: " in error and message in error


def test_verdicts_are_not_overwritten(folders, tmp_path, capsys):
    out = tmp_path / "audit"
    draw(folders, out, "--images", "5")
    assert draw(folders, out, "--images", "4") == ExitStatus.DONE
    judge(out, lambda number: True)
    assert draw(folders, out, "--images", "5") == ExitStatus.WRONG_CONFIGURATION
    assert "holds 4 verdicts, which would be lost; name another --out" in capsys.readouterr().err


def test_more_images_than_there_are_and_an_absent_model_are_refused(folders, tmp_path, capsys):
    assert draw(folders, tmp_path / "audit") == ExitStatus.WRONG_CONFIGURATION
    assert "--images: 24 images are framed correct, fewer than 100; lower it" in capsys.readouterr().err
    assert draw(folders, tmp_path / "audit", "--model", "last") == ExitStatus.WRONG_CONFIGURATION
    assert "has no images of 'last'; it has those of base, policy" in capsys.readouterr().err


def test_prompts_of_another_evaluation_are_refused(folders, tmp_path, capsys):
    write_prompts(Path(folders[1]) / EVALUATION_PROMPTS, PROMPTS[:3])
    assert draw(folders, tmp_path / "audit") == ExitStatus.WRONG_CONFIGURATION
    assert "evaluation.jsonl has the digest" in capsys.readouterr().err


def test_folder_without_an_evaluation_is_refused(tmp_path, capsys):
    assert draw([str(tmp_path)], tmp_path / "audit") == ExitStatus.WRONG_CONFIGURATION
    assert "evaluation.jsonl does not exist; run `python -m sfgrpo prompts` there" in capsys.readouterr().err
