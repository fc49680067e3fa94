"""The mirror of a run, with a real server that is killed, and faults of network and disk."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sfgrpo.checkpoint.snapshots import prune_snapshots, read_snapshot
from sfgrpo.errors import ConfigError, MirrorError
from sfgrpo.runtime.files import atomic_directory
from sfgrpo.runtime.manifest import verify_manifest, write_manifest
from sfgrpo.runtime.redaction import without_secrets
from sfgrpo.storage import mirror, s3
from sfgrpo.storage.mirror import Mirror
from sfgrpo.storage.parts import PART_SIZE
from sfgrpo.storage.restore import require_run, restore_run
from sfgrpo.storage.s3 import Bucket
from sfgrpo.tracking import delivery
from tests.support.faulty_proxy import FaultyProxy
from tests.support.published import publish
from tests.support.s3 import BUCKET, PROGRAM, PYTHON, S3Server

WAIT_S = 60.0
BIG = PART_SIZE + 1


@pytest.fixture
def uri(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A prefix for this test, and an environment with the server's address and keys."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{request.node.originalname}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a run with its inputs, a sample grid and no checkpoint."""
    (tmp_path / "run" / "inputs" / "deep").mkdir(parents=True)
    (tmp_path / "run" / "inputs" / "deep" / "prompts.jsonl").write_text("a red square\n")
    (tmp_path / "run" / "samples_000000.png").write_bytes(os.urandom(1000))
    return tmp_path / "run"


def save(folder: Path, update: int, *, keep: int = 2, size: int = 2000) -> Path:
    root = folder / "checkpoints"
    path = root / f"update-{update:06d}"
    with atomic_directory(path) as partial:
        (partial / "state.safetensors").write_bytes(os.urandom(size))
        (partial / "state.json").write_text(f'{{"update": {update}}}')
        write_manifest(partial)
    for old in sorted(root.glob("update-*"))[:-keep]:
        shutil.rmtree(old)
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stored(server: S3Server, uri: str) -> dict[str, bytes]:
    client, prefix = server.client(), f"{uri.removeprefix(f's3://{BUCKET}/')}/run/"
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
    return {key.removeprefix(prefix): client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}


def sent(uri: str, folder: Path) -> None:
    """Mirror the folder, then forget what was sent."""
    copy = Mirror(uri, folder)
    copy.sync()
    assert copy.wait(WAIT_S)
    copy.close(WAIT_S)


def damage(server: S3Server, uri: str, name: str, change: Callable[[bytes], bytes]) -> None:
    client, key = server.client(), f"{uri.removeprefix(f's3://{BUCKET}/')}/run/{name}"
    found = client.get_object(Bucket=BUCKET, Key=key)
    client.put_object(Bucket=BUCKET, Key=key, Body=change(found["Body"].read()), Metadata=found["Metadata"])


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.fixture
def proxy(s3_server: S3Server, uri: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(s3_server.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setattr(s3, "NUM_ATTEMPTS", 1)
    yield proxy
    proxy.close()


def test_bare_machine_gets_the_folder_bit_for_bit(uri, folder, tmp_path):
    save(folder, 10, size=BIG)
    save(folder, 20, size=0)
    (folder / "best").mkdir()
    (folder / "best" / "adapter.safetensors").write_bytes(b"best")
    sent(uri, folder)
    bare = tmp_path / "bare" / "run"
    assert restore_run(uri, bare)
    newest = {name: data for name, data in content(folder).items() if "update-000010" not in name}
    assert content(bare) == newest
    verify_manifest(bare / "checkpoints" / "update-000020")
    assert not restore_run(uri, bare)


def test_file_of_many_parts_comes_back_bit_for_bit(uri, folder, tmp_path):
    path = save(folder, 10, size=2 * PART_SIZE + 12345)
    sent(uri, folder)
    assert restore_run(uri, tmp_path / "bare" / "run")
    assert content(tmp_path / "bare" / "run" / "checkpoints" / path.name) == content(path)


def test_bucket_follows_while_checkpoints_come_and_go(s3_server, uri, folder):
    copy = Mirror(uri, folder)
    for update in range(1, 13):
        save(folder, update)
        copy.sync()
        time.sleep(0.05)
    (folder / "samples_000012.png").write_bytes(b"late")
    copy.sync()
    assert copy.wait(WAIT_S)
    copy.close(WAIT_S)
    assert stored(s3_server, uri) == content(folder)
    assert {name.split("/")[1] for name in content(folder) if name.startswith("checkpoints")} == {
        "update-000011",
        "update-000012",
    }


def test_snapshots_are_in_the_bucket_as_long_as_they_are_in_the_folder(s3_server, uri, folder, tmp_path):
    for update in (0, 5):
        publish(folder, update)
    save(folder, 10)
    sent(uri, folder)
    assert stored(s3_server, uri) == content(folder)
    assert restore_run(uri, tmp_path / "bare" / "run")
    assert read_snapshot(tmp_path / "bare" / "run", 5) == read_snapshot(folder, 5)
    prune_snapshots(folder, {5})
    save(folder, 20)
    sent(uri, folder)
    assert stored(s3_server, uri) == content(folder)
    assert {"snapshots/update-000000.json", "snapshots/update-000005/adapter"} <= content(folder).keys()


@pytest.mark.slow
def test_server_that_is_killed_midway_gets_everything_in_the_end(s3_server, uri, folder, monkeypatch, caplog):
    monkeypatch.setattr(s3, "NUM_ATTEMPTS", 1)
    copy = Mirror(uri, folder)
    for update in (1, 2):
        save(folder, update, size=BIG)
    copy.sync()
    while not any("update-000002" in name for name in Bucket(uri).sizes()):
        time.sleep(0.02)
    s3_server.kill()
    try:
        save(folder, 3)
        copy.sync()
        assert not copy.wait(2.0)
    finally:
        s3_server.start()
    assert copy.wait(WAIT_S)
    copy.close(WAIT_S)
    assert stored(s3_server, uri) == content(folder)
    warnings = [record.message for record in caplog.records if record.name == "sfgrpo.tracking.delivery"]
    assert "run fails and is retried until it succeeds: " in warnings[0]
    assert "works again" in warnings[-1]


@pytest.mark.slow
def test_data_survive_the_death_of_the_server_and_no_process_is_left(tmp_path):
    server = S3Server(tmp_path)
    with server:
        server.client().create_bucket(Bucket="kept")
        server.client().put_object(Bucket="kept", Key="key", Body=b"value", Metadata={"a": "b"})
        server.kill()
        deadline = time.monotonic() + 5
        while processes_with(str(tmp_path / "data")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        server.start()
        found = server.client().get_object(Bucket="kept", Key="key")
        assert (found["Body"].read(), found["Metadata"]) == (b"value", {"a": "b"})
    assert not processes_with(str(tmp_path / "data"))


def processes_with(argument: str) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        found += [int(process.name)] if argument in arguments else []
    return found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--access-key", "nocolon"], "the access key 'nocolon' is not of the form account:name"),
        (["--access-key", "a:b"], "the secret key must have at least 8 letters, digits and"),
    ],
)
def test_server_refuses_keys_that_it_cannot_have(tmp_path, arguments, message):
    command = [str(PYTHON), str(PROGRAM), "--folder", str(tmp_path), "--port", "1", *arguments]
    process = subprocess.run(command, env={"AWS_SECRET_ACCESS_KEY": "s p a c e s"}, capture_output=True, text=True)
    assert process.returncode != 0 and message in process.stderr
    assert "s p a c e s" not in process.stderr


def test_missing_server_is_a_failure_that_names_the_cure(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.support.s3.PYTHON", tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="run `make s3-server`"):
        S3Server(tmp_path).start()


def test_manifest_is_written_last_and_removed_first(uri, folder, proxy):
    save(folder, 1)
    copy = Mirror(uri, folder)
    copy.sync()
    assert copy.wait(WAIT_S)
    save(folder, 2, keep=1)
    copy.sync()
    assert copy.wait(WAIT_S)
    copy.close(WAIT_S)
    changes = [
        (method, path.partition("?")[0].split("checkpoints/")[1])
        for method, path in proxy.requests
        if method in ("PUT", "DELETE") and "checkpoints/" in path
    ]
    assert [change for change in changes if "update-000001" in change[1]] == [
        ("PUT", "update-000001/state.json"),
        ("PUT", "update-000001/state.safetensors"),
        ("PUT", "update-000001/manifest.json"),
        ("DELETE", "update-000001/manifest.json"),
        ("DELETE", "update-000001/state.json"),
        ("DELETE", "update-000001/state.safetensors"),
    ]
    assert changes[5] == ("PUT", "update-000002/manifest.json")


def test_half_uploaded_checkpoint_is_not_taken_for_whole(s3_server, uri, folder, tmp_path, caplog):
    save(folder, 1)
    save(folder, 2)
    sent(uri, folder)
    Bucket(uri).remove("run/checkpoints/update-000002/manifest.json")
    bare = tmp_path / "bare" / "run"
    assert restore_run(uri, bare)
    assert [path.name for path in (bare / "checkpoints").iterdir()] == ["update-000001"]
    sent(uri, folder)
    assert stored(s3_server, uri) == content(folder)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("state.safetensors", flipped),
        ("state.safetensors", lambda content: content[:-1]),
        ("manifest.json", lambda content: content[:-10]),
        ("manifest.json", lambda content: b""),
    ],
)
def test_damaged_checkpoint_is_skipped_for_an_older_one(s3_server, uri, folder, tmp_path, caplog, name, change):
    save(folder, 1)
    save(folder, 2)
    sent(uri, folder)
    damage(s3_server, uri, f"checkpoints/update-000002/{name}", change)
    bare = tmp_path / "bare" / "run"
    assert restore_run(uri, bare)
    assert [path.name for path in (bare / "checkpoints").iterdir()] == ["update-000001"]
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "skipped checkpoint update-000002 of" in record.message and "is damaged" in record.message


def test_damaged_file_is_left_out_with_a_warning(s3_server, uri, folder, tmp_path, caplog):
    sent(uri, folder)
    damage(s3_server, uri, "samples_000000.png", flipped)
    bare = tmp_path / "bare" / "run"
    assert restore_run(uri, bare)
    assert list(content(bare)) == ["inputs/deep/prompts.jsonl"]
    assert "skipped samples_000000.png of" in caplog.text


def test_folder_with_a_newer_checkpoint_keeps_what_it_has(uri, folder):
    save(folder, 1)
    sent(uri, folder)
    save(folder, 2)
    (folder / "samples_000000.png").write_bytes(b"mine")
    (folder / "inputs" / "deep" / "prompts.jsonl").unlink()
    assert restore_run(uri, folder)
    assert (folder / "samples_000000.png").read_bytes() == b"mine"
    assert (folder / "inputs" / "deep" / "prompts.jsonl").exists()


def test_files_of_a_newer_checkpoint_come_with_it(uri, folder, tmp_path):
    (folder / "best").write_bytes(b"first")
    save(folder, 1)
    older = tmp_path / "older" / "run"
    shutil.copytree(folder, older)
    (folder / "best").write_bytes(b"second")
    save(folder, 2)
    sent(uri, folder)
    assert restore_run(uri, older)
    assert (older / "best").read_bytes() == b"second"
    assert (older / "checkpoints" / "update-000002").exists()


def test_damaged_checkpoint_of_the_folder_is_replaced(uri, folder):
    path = save(folder, 1)
    whole = content(path)
    sent(uri, folder)
    (path / "state.json").write_text("damaged")
    assert restore_run(uri, folder)
    assert content(path) == whole


def test_damaged_checkpoint_of_the_folder_is_not_uploaded(s3_server, uri, folder, caplog):
    save(folder, 1)
    (save(folder, 2) / "state.json").write_text("damaged")
    copy = Mirror(uri, folder)
    copy.sync()
    while not any("update-000001/manifest.json" in name for name in Bucket(uri).sizes()):
        time.sleep(0.05)
    assert not copy.wait(0.5)
    save(folder, 3, keep=1)
    assert copy.wait(WAIT_S)
    copy.close(WAIT_S)
    assert stored(s3_server, uri) == content(folder)
    assert sum("state.json is damaged" in record.message for record in caplog.records) == 1


def test_checkpoint_that_is_made_anew_replaces_the_one_in_the_bucket(s3_server, uri, folder):
    save(folder, 1)
    sent(uri, folder)
    save(folder, 1)
    sent(uri, folder)
    assert stored(s3_server, uri) == content(folder)


def test_checkpoints_after_the_newest_of_the_folder_stay_in_the_bucket(uri, folder, tmp_path):
    for update in (1, 2):
        save(folder, update)
    sent(uri, folder)
    bare = tmp_path / "bare" / "run"
    bare.mkdir(parents=True)
    sent(uri, bare)
    save(bare, 1)
    sent(uri, bare)
    assert restore_run(uri, bare)
    assert (bare / "checkpoints" / "update-000002").exists()


def test_what_is_there_is_not_sent_again(uri, folder, proxy):
    save(folder, 1)
    copy = Mirror(uri, folder)
    copy.sync()
    assert copy.wait(WAIT_S)
    del proxy.requests[:]
    copy.sync()
    assert copy.wait(WAIT_S)
    copy.close(WAIT_S)
    assert [method for method, _ in proxy.requests] == ["GET"]
    sent(uri, folder)
    assert {method for method, _ in proxy.requests} == {"GET", "HEAD"}


def test_request_returns_at_once(uri, folder, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(s3, "READ_TIMEOUT_S", 0.5)
        monkeypatch.setattr(s3, "NUM_ATTEMPTS", 1)
        save(folder, 1, size=BIG)
        copy = Mirror(uri, folder)
        started = time.monotonic()
        for _ in range(100):
            copy.sync()
        assert time.monotonic() - started < 0.5
        assert len(copy._queue) == 2, "the upload in progress, and one for all that came later"
        copy.close(0.1)


@pytest.mark.parametrize("mode", ["status", "cut_request"])
def test_outage_and_its_end_are_logged_once_each(s3_server, uri, folder, proxy, monkeypatch, caplog, mode):
    monkeypatch.setattr(delivery, "FIRST_DELAY_S", 0.05)
    monkeypatch.setattr(mirror, "MAX_DELAY_S", 0.1)
    save(folder, 1)
    proxy.mode = mode
    copy = Mirror(uri, folder)
    copy.sync()
    while len(proxy.requests) < 5:
        time.sleep(0.02)
    assert not copy.wait(0.1)
    proxy.mode = "pass"
    assert copy.wait(WAIT_S)
    copy.close(WAIT_S)
    assert stored(s3_server, uri) == content(folder)
    messages = [record.message for record in caplog.records if record.name == "sfgrpo.tracking.delivery"]
    assert len(messages) == 2
    assert "is retried until it succeeds" in messages[0] and "works again" in messages[1]


def test_mirror_that_closes_in_an_outage_warns_of_what_is_missing(uri, folder, proxy, caplog):
    proxy.mode = "status"
    copy = Mirror(uri, folder)
    copy.sync()
    copy.close(0.3)
    assert f"{uri}/run is incomplete after waiting 0.3 s; the whole run is in {folder}" in caplog.text


def test_upload_that_arrives_changed_is_detected(uri, folder, monkeypatch):
    target = Bucket(uri)
    transfer = target._client.put_object
    monkeypatch.setattr(
        target._client, "put_object", lambda **which: transfer(**which | {"Body": flipped(which["Body"])})
    )
    with pytest.raises(MirrorError, match="file is not what was sent"):
        target.put("file", io.BytesIO(b"content"))


def test_part_that_arrives_changed_is_detected(uri, monkeypatch):
    target = Bucket(uri)
    transfer = target._client.upload_part
    monkeypatch.setattr(
        target._client, "upload_part", lambda **which: transfer(**which | {"Body": flipped(which["Body"])})
    )
    with pytest.raises(MirrorError, match="file is not what was sent"):
        target.put("file", io.BytesIO(bytes(BIG)))


@pytest.mark.parametrize("size", [0, 7, BIG])
def test_upload_under_an_etag_that_is_no_md5_is_read_back(uri, proxy, monkeypatch, size):
    target, content = Bucket(uri), os.urandom(size)
    answers = iter([{"ETag": '"something else"'}])
    head = target._client.head_object
    monkeypatch.setattr(target._client, "head_object", lambda **which: head(**which) | next(answers, {}))
    target.put("file", io.BytesIO(content))
    assert target.sha256("file") == hashlib.sha256(content).hexdigest()
    assert ("GET" in {method for method, _ in proxy.requests}) == (size > 0)


@pytest.mark.parametrize("size", [0, 1, PART_SIZE - 1, PART_SIZE, PART_SIZE + 1])
def test_etag_of_the_server_is_sufficient_proof(uri, proxy, size):
    file, came = io.BytesIO(os.urandom(size)), io.BytesIO()
    target = Bucket(uri)
    target.put("file", file)
    assert "GET" not in {method for method, _ in proxy.requests}
    assert target.fetch("file", came) == hashlib.sha256(file.getvalue()).hexdigest() == target.sha256("file")
    assert came.getvalue() == file.getvalue()


def test_file_that_changes_while_it_is_uploaded_is_an_error(uri):
    class Changing(io.BytesIO):
        def seek(self, *arguments: int) -> int:
            place = super().seek(*arguments)
            if self.tell() == 0 and was_read:
                self.write(b"after")
                super().seek(0)
            return place

        def getbuffer(self) -> memoryview:
            was_read.append(True)
            return super().getbuffer()

    was_read: list[bool] = []
    with pytest.raises(MirrorError, match=r"file changed during its upload; upload it again$"):
        Bucket(uri).put("file", Changing(b"before"))


def test_wrong_secret_is_a_clear_error_without_the_secret(uri, folder, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-and-secret")
    with pytest.raises(MirrorError) as caught:
        restore_run(uri, folder)
    assert f"{uri}/run cannot be used with these credentials (SignatureDoesNotMatch: " in str(caught.value)
    assert "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY" in str(caught.value)
    copy = Mirror(uri, folder)
    copy.sync()
    copy.close(10.0)
    assert "SignatureDoesNotMatch" in caplog.text
    assert "wrong-and-secret" not in str(caught.value) + caplog.text


def test_missing_credentials_are_a_clear_error(uri, folder, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "absent"))
    with pytest.raises(
        MirrorError, match=r"cannot be used with these credentials \(NoCredentialsError: .*; check AWS_"
    ):
        restore_run(uri, folder)


def test_secrets_in_messages_are_masked(uri, folder, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:password@127.0.0.1:1")
    monkeypatch.setattr(s3, "NUM_ATTEMPTS", 1)
    with pytest.raises(MirrorError) as caught:
        restore_run(uri, folder)
    assert "password" not in str(caught.value) and "cannot be used" in str(caught.value)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token-with-a-newline\n")
    assert without_secrets("Invalid header value b'token-with-a-newline\\n'") == "Invalid header value b'***\\n'"


def test_unreachable_server_is_a_clear_error(uri, folder, monkeypatch):
    monkeypatch.setattr(s3, "NUM_ATTEMPTS", 2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(MirrorError, match=rf"{uri}/run cannot be used \(EndpointConnectionError: .*AWS_ENDPOINT_URL"):
        restore_run(uri, folder)


def test_missing_bucket_is_a_clear_error(uri, folder):
    with pytest.raises(
        MirrorError, match="s3://absent/runs/run: there is no such bucket; create it or correct the address"
    ):
        restore_run("s3://absent/runs", folder)


@pytest.mark.parametrize("wrong", ["runs", "s3://", "s3://key:secret@runs/prefix", "https://runs/prefix", "s3:/runs"])
def test_invalid_address_of_a_bucket_is_refused(tmp_path, wrong):
    with pytest.raises(ConfigError, match="is not the address of a bucket; use one like s3://bucket/prefix") as caught:
        Mirror(wrong, tmp_path)
    assert "secret" not in str(caught.value)


def test_runs_of_a_bucket_are_listed(uri, folder):
    with pytest.raises(MirrorError, match=rf"^no run run in {uri}; the runs there are none$"):
        require_run(uri, "run")
    sent(uri, folder)
    sent(uri, Path(shutil.copytree(folder, folder.with_name("other"))))
    assert Bucket(uri).folders() == ["other", "run"]
    require_run(f"{uri}/", "run")
    with pytest.raises(MirrorError, match=rf"^no run third in {uri}; the runs there are other, run$"):
        require_run(uri, "third")


def test_name_that_leads_out_of_the_folder_is_ignored(s3_server, uri, tmp_path):
    prefix = uri.removeprefix(f"s3://{BUCKET}/")
    for key in (f"{prefix}/run/", f"{prefix}/run/a//b", f"{prefix}/run/../../escaped"):
        s3_server.client().put_object(Bucket=BUCKET, Key=key, Body=b"")
    assert Bucket(f"{uri}/run").sizes() == {}


def test_process_ends_while_a_server_hangs(s3_server, uri, folder):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        program = (
            "import sys; from pathlib import Path; from sfgrpo.storage.mirror import Mirror\n"
            "copy = Mirror(sys.argv[1], Path(sys.argv[2])); copy.sync(); copy.close(0.5); print('closed')"
        )
        environment = os.environ | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        command = [sys.executable, "-c", program, uri, str(folder)]
        process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50)
    assert (process.returncode, process.stdout) == (0, "closed\n")
