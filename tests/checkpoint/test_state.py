import dataclasses
import json
import logging
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sfgrpo.checkpoint.snapshots import list_snapshots
from sfgrpo.checkpoint.state import TrainingState, checkpoint_path, latest_checkpoint, load_checkpoint, save_checkpoint
from sfgrpo.errors import ConfigError, IntegrityError
from sfgrpo.runtime.manifest import write_manifest
from tests.support.comparing import assert_same
from tests.support.published import publish

FILES = ("adapter.safetensors", "state.safetensors", "state.json", "history.jsonl", "manifest.json")


def state_of(update_index: int, **changes: Any) -> TrainingState:
    tensors = {"lora": torch.full((4, 4), float(update_index))}
    empty = TrainingState(
        update_index=update_index, adapter=tensors, ema=tensors, optimizer={}, rng={}, config={}, history=()
    )
    return dataclasses.replace(empty, **changes)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def train(module: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int, generator: torch.Generator) -> None:
    for _ in range(num_steps):
        optimizer.zero_grad()
        module(torch.randn(8, 3, generator=generator)).square().mean().backward()
        optimizer.step()


def test_every_field_comes_back_bit_for_bit(tmp_path):
    module = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, betas=(0.9, 0.999), foreach=None)
    train(module, optimizer, 3, torch.Generator().manual_seed(0))
    state = TrainingState(
        update_index=3,
        adapter={
            "half": torch.tensor([1 / 3, math.inf, -0.0], dtype=torch.bfloat16),
            "odd": torch.tensor([math.nan, 5e-324], dtype=torch.float64),
            "transposed": torch.arange(6.0).view(2, 3).T,
            "empty": torch.empty(0, 3),
        },
        ema={"num_updates": 3, "averages": dict(module.state_dict())},
        optimizer=optimizer.state_dict(),
        rng={"noise": torch.Generator().manual_seed(7).get_state(), "seed": 2**63},
        config={"update.betas": [0.9, 0.999], "policy.revision": None, "seed": 0},
        history=({"reward": 0.1 + 0.2, "tiny": 5e-324}, {"reward": math.nan, "note": "grün\u2028"}),
        extra={"run_id": "abc", "best": {"update_index": 2, "reward": 1 / 3}, "list": [1, [2, (3,)]]},
    )
    loaded = load_checkpoint(save_checkpoint(tmp_path, state, keep=1))
    for field in dataclasses.fields(state):
        assert_same(getattr(loaded, field.name), getattr(state, field.name))


def test_resumed_training_equals_training_in_one_go(tmp_path):
    def fresh() -> tuple[nn.Module, torch.optim.AdamW, torch.Generator]:
        torch.manual_seed(1)
        module = nn.Linear(3, 2)
        return module, torch.optim.AdamW(module.parameters(), lr=0.1), torch.Generator().manual_seed(2)

    whole, *rest = fresh()
    train(whole, rest[0], 10, rest[1])

    module, optimizer, generator = fresh()
    train(module, optimizer, 4, generator)
    rng = {"noise": generator.get_state()}
    state = state_of(4, adapter=module.state_dict(), optimizer=optimizer.state_dict(), rng=rng)
    loaded = load_checkpoint(save_checkpoint(tmp_path, state, keep=1))

    module, optimizer, generator = fresh()
    module.load_state_dict(loaded.adapter)
    optimizer.load_state_dict(loaded.optimizer)
    generator.set_state(loaded.rng["noise"])
    train(module, optimizer, 6, generator)
    assert_same(dict(module.state_dict()), dict(whole.state_dict()))


def test_saved_tensors_are_those_of_the_moment(tmp_path):
    adapter = {"lora": torch.zeros(2)}
    path = save_checkpoint(tmp_path, state_of(1, adapter=adapter), keep=1)
    adapter["lora"].fill_(1)
    torch.testing.assert_close(load_checkpoint(path).adapter["lora"], torch.zeros(2))


def test_tensors_that_share_their_memory_can_be_saved(tmp_path):
    whole = torch.arange(4.0)
    state = state_of(1, adapter={"whole": whole, "part": whole[2:], "again": whole})
    loaded = load_checkpoint(save_checkpoint(tmp_path, state, keep=1))
    assert_same(loaded.adapter, state.adapter)


def test_checkpoint_holds_no_pickle(tmp_path):
    path = save_checkpoint(tmp_path, state_of(3, optimizer={"state": {0: {"step": torch.tensor(1.0)}}}), keep=1)
    assert path == tmp_path / "update-000003"
    assert names(path) == sorted(FILES)
    json.loads((path / "state.json").read_text())


def test_value_that_json_does_not_know_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_checkpoint(tmp_path / "root", state_of(1, extra={"path": Path("x")}), keep=1)
    assert not (tmp_path / "root").exists()


def test_newest_checkpoints_are_kept(tmp_path):
    for update_index in range(1, 8):
        save_checkpoint(tmp_path, state_of(update_index), keep=2)
    assert names(tmp_path) == ["update-000006", "update-000007"]


def test_checkpoint_just_written_is_never_pruned(tmp_path):
    save_checkpoint(tmp_path, state_of(9), keep=1)
    flip_a_bit(tmp_path / "update-000009" / "state.json")
    save_checkpoint(tmp_path, state_of(5), keep=1)
    assert latest_checkpoint(tmp_path) == tmp_path / "update-000005"


def test_checkpoint_of_the_same_update_is_replaced(tmp_path):
    save_checkpoint(tmp_path, state_of(1), keep=1)
    flip_a_bit(tmp_path / "update-000001" / "state.json")
    save_checkpoint(tmp_path, state_of(1, extra={"second": True}), keep=1)
    assert load_checkpoint(tmp_path / "update-000001").extra == {"second": True}


def test_latest_checkpoint_is_the_one_of_most_updates(tmp_path):
    for update_index in (999_999, 1_000_000, 2):
        save_checkpoint(tmp_path, state_of(update_index), keep=5)
    assert latest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 1_000_000)


def test_no_checkpoint_is_none(tmp_path):
    assert latest_checkpoint(tmp_path / "absent") is None
    (tmp_path / ".update-000001.0123abcd.partial").mkdir()
    (tmp_path / "update-notes").mkdir()
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [flip_a_bit, Path.unlink, lambda file: os.truncate(file, 1)])
def test_damaged_checkpoint_is_skipped_with_a_warning_that_names_it(tmp_path, caplog, file, damage):
    for update_index in (1, 2):
        save_checkpoint(tmp_path, state_of(update_index, history=[{"reward": 1.0}]), keep=2)
    damage(tmp_path / "update-000002" / file)
    with caplog.at_level(logging.WARNING):
        latest = latest_checkpoint(tmp_path)
    assert latest == tmp_path / "update-000001"
    assert load_checkpoint(latest).update_index == 1
    (record,) = caplog.records
    assert "update-000002" in record.message and "expected" in record.message and "found" in record.message


def test_warning_holds_file_and_both_digests(tmp_path, caplog):
    for update_index in (1, 2):
        save_checkpoint(tmp_path, state_of(update_index), keep=2)
    flip_a_bit(tmp_path / "update-000002" / "adapter.safetensors")
    latest_checkpoint(tmp_path)
    assert "adapter.safetensors is damaged: expected sha256 " in caplog.text and "found sha256 " in caplog.text


def test_damaged_checkpoint_is_not_loaded(tmp_path):
    path = save_checkpoint(tmp_path, state_of(1), keep=1)
    flip_a_bit(path / "adapter.safetensors")
    with pytest.raises(IntegrityError, match=r"adapter\.safetensors is damaged"):
        load_checkpoint(path)


def test_only_damaged_checkpoints_are_an_error_and_not_a_new_start(tmp_path):
    for update_index in (1, 2):
        path = save_checkpoint(tmp_path, state_of(update_index), keep=2)
        flip_a_bit(path / "state.json")
    with pytest.raises(IntegrityError, match=r"update-000002/state\.json is damaged"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize(("found", "told"), [(2, "2"), (None, "none")])
def test_checkpoint_of_another_format_is_refused_before_its_tensors_are_read(tmp_path, found, told):
    path = save_checkpoint(tmp_path, state_of(1), keep=1)
    values = json.loads((path / "state.json").read_text())
    assert values["format"] == 1
    values["format"] = found
    (path / "state.json").write_text(json.dumps(values))
    (path / "state.safetensors").write_bytes(b"unreadable")
    write_manifest(path)
    complaint = f"update-000001 has format {told}, and this version of sfgrpo reads format 1 only; go on with the"
    with pytest.raises(ConfigError, match=complaint):
        load_checkpoint(path)


def test_snapshot_of_another_format_is_refused(tmp_path):
    publish(tmp_path, 3)
    record = tmp_path / "snapshots/update-000003.json"
    values = json.loads(record.read_text())
    assert values.pop("format") == 1
    record.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"update-000003\.json has format none, and this version of sfgrpo reads"):
        list_snapshots(tmp_path)


def test_unlisted_file_makes_a_checkpoint_damaged(tmp_path):
    path = save_checkpoint(tmp_path, state_of(1), keep=1)
    (path / "stray").touch()
    with pytest.raises(IntegrityError, match="stray is damaged: expected no file"):
        load_checkpoint(path)
    write_manifest(path)
    load_checkpoint(path)


FILL_THE_DISK = """
import resource, sys
from pathlib import Path
import torch
from sfgrpo.checkpoint.state import TrainingState, latest_checkpoint, load_checkpoint, save_checkpoint

root, limit = Path(sys.argv[1]), int(sys.argv[2])

def save(update_index, num_elements):
    adapter = {"lora": torch.full((num_elements,), float(update_index))}
    state = TrainingState(
        update_index=update_index, adapter=adapter, ema={}, optimizer={}, rng={}, config={}, history=()
    )
    save_checkpoint(root, state, keep=1)

save(1, 1000)
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    save(2, 1_000_000)
except OSError as error:
    print(error.errno, error)
print(sorted(path.name for path in root.iterdir()))
print(load_checkpoint(latest_checkpoint(root)).adapter["lora"].sum().item())
save(3, 1000)
print(latest_checkpoint(root).name)
"""


def assert_survived_a_full_disk(output: str, errno_and_reason: str) -> None:
    message, before, loaded, after = output.splitlines()
    assert message.startswith(errno_and_reason[:3]) and errno_and_reason[3:] in message
    assert "earlier checkpoints are untouched, so make room and start again" in message
    assert before == "['update-000001']"
    assert loaded == "1000.0"
    assert after == "update-000003"


def test_file_that_cannot_grow_leaves_the_earlier_checkpoint_intact(tmp_path):
    command = [sys.executable, "-c", FILL_THE_DISK, str(tmp_path), str(500_000)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    assert_survived_a_full_disk(output, "27 File too large")


def test_full_disk_leaves_the_earlier_checkpoint_intact(tmp_path):
    # A mount namespace of its own: the small disk is gone with the process.
    unshare = ["unshare", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("this machine allows no mount namespace, so there is no small disk to fill")
    mounted = 'mount -t tmpfs -o size=2m tmpfs "$1" && exec "$2" -c "$3" "$1" 0'
    command = [*unshare, "sh", "-c", mounted, "sh", str(tmp_path), sys.executable, FILL_THE_DISK]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    assert_survived_a_full_disk(output, "28 No space left on device")


def _save_for_ever(root: Path, first: int) -> None:
    for update_index in range(first, 10**6):
        save_checkpoint(root, state_of(update_index, ema={"big": torch.zeros(100_000)}), keep=2)


def test_killed_writer_leaves_a_valid_checkpoint(tmp_path):
    moments = random.Random(0)
    first = 1
    for _ in range(5):
        writer = multiprocessing.get_context("fork").Process(target=_save_for_ever, args=(tmp_path, first))
        writer.start()
        deadline = time.monotonic() + 60
        while not checkpoint_path(tmp_path, first).exists():
            assert time.monotonic() < deadline and writer.is_alive()
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.1))
        writer.kill()
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        latest = latest_checkpoint(tmp_path)
        assert latest is not None
        loaded = load_checkpoint(latest)
        assert loaded.update_index >= first
        assert_same(loaded.adapter, state_of(loaded.update_index).adapter)
        first = loaded.update_index + 1
    save_checkpoint(tmp_path, state_of(first), keep=1)
    assert names(tmp_path) == [checkpoint_path(tmp_path, first).name]
