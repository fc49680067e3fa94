"""A bucket behind a faulty network, with encryption, and in both addressing styles."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sfgrpo.errors import MirrorError
from sfgrpo.runtime.files import atomic_directory
from sfgrpo.runtime.manifest import write_manifest
from sfgrpo.storage import s3
from sfgrpo.storage.mirror import Mirror
from sfgrpo.storage.parts import PART_SIZE
from sfgrpo.storage.restore import restore_run
from sfgrpo.storage.s3 import Bucket
from tests.support.faulty_proxy import FaultyProxy
from tests.support.s3 import BUCKET, S3Server

PARTS = 3
CONTENT = os.urandom(PARTS * PART_SIZE + 12345)
SMALL = CONTENT[:5000]
KEY = "arn:aws:kms:us-east-1:123456789012:key/11111111-2222-3333-4444-555555555555"


@pytest.fixture
def uri(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A prefix for this test, and an environment with the server's address and keys."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{request.node.originalname}"


@pytest.fixture
def proxy(s3_server: S3Server, uri: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(s3_server.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    yield proxy
    proxy.close()


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Skip the pauses between attempts; return them, in seconds."""
    pauses: list[float] = []
    monkeypatch.setattr("botocore.endpoint.time.sleep", pauses.append)
    monkeypatch.setattr(s3.time, "sleep", pauses.append)
    return pauses


@pytest.fixture
def moto(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """Start a server that supports encryption, put it in the environment and yield its address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    url = f"http://127.0.0.1:{port}"
    for name, value in {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "moto",
        "AWS_SECRET_ACCESS_KEY": "moto-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    client().create_bucket(Bucket=BUCKET)
    yield url
    server.stop()


def client() -> Any:
    import boto3

    return boto3.session.Session().client("s3")


def there_and_back(target: Bucket, content: bytes) -> None:
    came = io.BytesIO()
    target.put("file", io.BytesIO(content))
    digest = hashlib.sha256(content).hexdigest()
    assert target.fetch("file", came) == target.sha256("file") == digest
    assert came.getvalue() == content


@pytest.mark.parametrize("mode", ["status", "cut_request", "cut_answer", "slow"])
@pytest.mark.parametrize("content", [SMALL, CONTENT], ids=["small", "in parts"])
def test_server_that_fails_every_third_time_is_retried(uri, proxy, no_pauses, mode, content):
    proxy.slow_s, proxy.every, proxy.mode = 0.2, 2 if content is SMALL else 3, mode
    there_and_back(Bucket(uri), content)
    assert proxy.num_faults


@pytest.mark.parametrize("status", [(500, "InternalError"), (503, "SlowDown"), (502, "BadGateway")])
def test_overload_is_retried_with_growing_random_pauses(uri, proxy, no_pauses, status):
    target = Bucket(uri)
    proxy.status, proxy.mode = status, "status"
    with pytest.raises(MirrorError, match=rf"cannot be used \({status[1]}: .*check the server, the network and AWS_"):
        target.sizes()
    first = list(no_pauses)
    assert len(first) == s3.NUM_ATTEMPTS - 1
    assert all(0 <= pause <= 2**tries for tries, pause in enumerate(first))
    with pytest.raises(MirrorError):
        target.sizes()
    assert no_pauses[len(first) :] != first


def test_download_that_breaks_off_is_retried_with_pauses(uri, proxy, no_pauses):
    target = Bucket(uri)
    target.put("file", io.BytesIO(SMALL))
    proxy.hits, proxy.mode = lambda method, path: method == "GET", "cut_answer"
    with pytest.raises(MirrorError, match=r"cannot be used \((IncompleteReadError|ResponseStreamingError): "):
        target.fetch("file", io.BytesIO())
    assert proxy.num_faults == s3.NUM_ATTEMPTS == len(no_pauses) + 1
    assert all(0 <= pause <= 2**tries for tries, pause in enumerate(no_pauses))


def test_server_that_hangs_counts_as_failed_after_a_time(uri, proxy, no_pauses, monkeypatch):
    monkeypatch.setattr(s3, "READ_TIMEOUT_S", 0.3)
    target = Bucket(uri)
    proxy.mode = "hang"
    with pytest.raises(MirrorError, match=r"cannot be used \(ReadTimeoutError: "):
        target.put("file", io.BytesIO(SMALL))
    assert len(no_pauses) == s3.NUM_ATTEMPTS - 1
    proxy.mode = "pass"
    there_and_back(target, SMALL)


def test_closed_port_is_retried_until_it_opens(uri, proxy):
    target = Bucket(uri)
    proxy.mode = "refuse"
    opener = threading.Timer(0.3, setattr, (proxy, "mode", "pass"))
    opener.start()
    there_and_back(target, SMALL)
    opener.join()


@pytest.mark.parametrize("mode", ["short", "flip"])
def test_body_that_is_changed_on_the_way_has_another_digest(uri, proxy, mode):
    target = Bucket(uri)
    target.put("file", io.BytesIO(SMALL))
    proxy.hits, proxy.mode = lambda method, path: method == "GET", mode
    came = io.BytesIO()
    assert target.fetch("file", came) == hashlib.sha256(came.getvalue()).hexdigest() != target.sha256("file")


@pytest.mark.parametrize("server", ["s3_server", "moto"])
def test_upload_whose_last_answer_is_lost_is_there(server, uri, request, monkeypatch, no_pauses):
    request.getfixturevalue(server)  # moto forgets an upload that is complete, Swift does not
    proxy = FaultyProxy(int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2]))
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    proxy.hits, proxy.at_most, proxy.mode = (
        lambda method, path: method == "POST" and "uploadId" in path,
        1,
        "lose_answer",
    )
    try:
        there_and_back(Bucket(uri), CONTENT)
    finally:
        proxy.close()
    assert proxy.num_faults == 1


def test_upload_that_fails_leaves_no_parts_behind(uri, proxy, no_pauses):
    proxy.hits, proxy.mode = lambda method, path: "partNumber=3" in path, "status"
    with pytest.raises(MirrorError, match="InternalError"):
        Bucket(uri).put("file", io.BytesIO(CONTENT))
    prefix = uri.removeprefix(f"s3://{BUCKET}/")
    assert not client().list_multipart_uploads(Bucket=BUCKET, Prefix=prefix).get("Uploads")
    assert ("file" in Bucket(uri).sizes()) is False


def test_object_that_is_replaced_during_its_download_is_not_mixed(uri, monkeypatch):
    target = Bucket(uri)
    target.put("file", io.BytesIO(CONTENT))
    read = target._client.get_object

    def replaced(**which: Any) -> Any:
        monkeypatch.setattr(target._client, "get_object", read)
        client().put_object(Bucket=BUCKET, Key=f"{uri.removeprefix(f's3://{BUCKET}/')}/file", Body=SMALL)
        return read(**which)

    monkeypatch.setattr(target._client, "get_object", replaced)
    with pytest.raises(s3.ObjectAbsentError, match="was removed or replaced meanwhile"):
        target.fetch("file", io.BytesIO())


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "ExpiredToken"),
        (403, "InvalidAccessKeyId"),
        (403, "AccessDenied"),
        (400, "InvalidToken"),
        (403, "SignatureDoesNotMatch"),
    ],
)
def test_refusal_is_raised_at_once_in_one_sentence(uri, proxy, no_pauses, status, code):
    proxy.status, proxy.mode = (status, code), "status"
    with pytest.raises(MirrorError) as caught:
        Bucket(uri).sizes()
    assert (proxy.num_faults, no_pauses) == (1, [])
    message = str(caught.value)
    assert f"cannot be used with these credentials ({code}: " in message and "\n" not in message
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in message


def test_key_that_was_changed_on_the_server_is_a_refusal(uri, monkeypatch, no_pauses):
    there_and_back(Bucket(uri), SMALL)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-secret-before-the-change")
    with pytest.raises(MirrorError, match=r"cannot be used with these credentials \(SignatureDoesNotMatch"):
        Bucket(uri).put("file", io.BytesIO(SMALL))
    assert not no_pauses


def test_absent_bucket_is_an_error_at_once(uri, proxy):
    with pytest.raises(MirrorError, match=r"^s3://absent/x: there is no such bucket; create it or correct"):
        Bucket("s3://absent/x").put("file", io.BytesIO(SMALL))
    assert len(proxy.requests) == 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["status", "cut_request", "cut_answer", "lose_answer", "slow"])
def test_mirror_brings_a_run_through_a_faulty_network_and_back(uri, proxy, no_pauses, tmp_path, mode):
    folder = tmp_path / "run"
    (folder / "inputs").mkdir(parents=True)
    (folder / "inputs" / "params.yaml").write_text("seed: 0")
    proxy.slow_s, proxy.every, proxy.mode = 0.2, 3, mode
    copy = Mirror(uri, folder)
    for update in (1, 2, 3):
        with atomic_directory(folder / f"checkpoints/update-{update:06d}") as partial:
            (partial / "state.safetensors").write_bytes(CONTENT)
            (partial / "state.json").write_text(f'{{"update": {update}}}')
            write_manifest(partial)
        copy.sync()
    assert copy.wait(120)
    copy.close(1)
    bare = tmp_path / "bare" / "run"
    assert restore_run(uri, bare)
    assert proxy.num_faults > 3
    newest = bare / "checkpoints" / "update-000003"
    assert (newest / "state.safetensors").read_bytes() == CONTENT
    assert (bare / "inputs" / "params.yaml").read_text() == "seed: 0"


@pytest.mark.parametrize(
    ("encryption", "expected"),
    [
        ("AES256", {"ServerSideEncryption": "AES256"}),
        ("aws:kms", {"ServerSideEncryption": "aws:kms"}),
        (f"aws:kms:{KEY}", {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": KEY}),
    ],
)
@pytest.mark.parametrize("content", [SMALL, CONTENT], ids=["small", "in parts"])
def test_upload_is_encrypted_as_asked(moto, encryption, expected, content):
    there_and_back(Bucket(f"s3://{BUCKET}/kept", encryption), content)
    head = client().head_object(Bucket=BUCKET, Key="kept/file")
    assert {name: head.get(name) for name in expected} == expected


@pytest.mark.parametrize("content", [SMALL, CONTENT], ids=["small", "in parts"])
def test_encryption_is_the_buckets_own_unless_asked_for(moto, content):
    rule = {"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": KEY}}
    client().put_bucket_encryption(Bucket=BUCKET, ServerSideEncryptionConfiguration={"Rules": [rule]})
    there_and_back(Bucket(f"s3://{BUCKET}/kept"), content)
    assert client().head_object(Bucket=BUCKET, Key="kept/file")["SSEKMSKeyId"] == KEY


def test_mirror_is_encrypted_as_asked(moto, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "best").write_bytes(SMALL)
    copy = Mirror(f"s3://{BUCKET}/kept", folder, "AES256")
    copy.sync()
    assert copy.wait(60)
    copy.close(1)
    assert client().head_object(Bucket=BUCKET, Key="kept/run/best")["ServerSideEncryption"] == "AES256"


def test_buckets_of_a_server_by_address_are_named_in_the_path(uri, proxy):
    Bucket(uri).sizes()
    ((_, path),) = proxy.requests
    assert path.startswith(f"/{BUCKET}?")


@pytest.mark.parametrize(
    ("endpoint", "style", "expected"),
    [
        (None, None, f"https://{BUCKET}.s3.eu-west-1.amazonaws.com/kept/file"),
        ("http://s3.example.org:9000", None, f"http://s3.example.org:9000/{BUCKET}/kept/file"),
        ("http://s3.example.org", "virtual", f"http://{BUCKET}.s3.example.org/kept/file"),
        (None, "path", f"https://s3.eu-west-1.amazonaws.com/{BUCKET}/kept/file"),
    ],
)
def test_buckets_are_named_in_the_host_at_aws_and_as_configured(uri, monkeypatch, tmp_path, endpoint, style, expected):
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    if endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    (tmp_path / "config").write_text(f"[default]\ns3 =\n  addressing_style = {style}\n" if style else "")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    asked = []

    def seen(request: Any, **more: Any) -> None:
        asked.append(request.url.partition("?")[0])
        raise ValueError("far enough")

    target = Bucket(f"s3://{BUCKET}/kept")
    target._client.meta.events.register("before-send.s3", seen)
    with pytest.raises(MirrorError, match="far enough"):
        target.sha256("file")
    assert asked == [expected]
