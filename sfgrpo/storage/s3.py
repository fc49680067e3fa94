"""Files in an S3 bucket, each proven to be what was sent.

The endpoint, the region and the credentials are those of the standard AWS variables and files. Needed are the rights
to list, read, write and delete, and to abort multipart uploads. A writer that is killed may leave parts of an upload
that nobody lists: a lifecycle rule should abort such uploads.

After each upload the size and the ETag are compared with the file's, an ETag being the MD5 that S3 defines for whole
objects and for those in parts. Where it is something else, under encryption by KMS say, the object is read back and
compared by SHA-256.

A request that fails by the network or by a status of 500 and more is tried again by botocore, in its standard mode:
after pauses that double, each multiplied by a random number so that many runs do not come back at once. Downloads that
break off are tried again here, in the same way.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple, TypeVar

from sfgrpo.errors import ConfigError, MirrorError
from sfgrpo.runtime.redaction import without_secrets

Item = TypeVar("Item")
Result = TypeVar("Result")

PART_SIZE = 8 * 2**20
"""Bytes of a part; files of at least this size go up, and come down, in parts: at most 10,000 of them, by S3."""
NUM_PARTS_AT_ONCE = 4
"""Parts of one file that are on their way at a time: so many requests, and so many parts in memory."""
PIECE_SIZE = 2**18
"""Bytes that are read from the network at a time; pieces as large as parts cost twice the CPU time."""
NUM_ATTEMPTS = 5
"""Tries of one request, with growing pauses of at most 15 seconds together, before it counts as failed."""
CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0

ABSENT = {"404", "NoSuchKey", "PreconditionFailed"}
REFUSALS = {
    "403",
    "AccessDenied",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "NoCredentialsError",
    "PartialCredentialsError",
    "SignatureDoesNotMatch",
}


class Digests(NamedTuple):
    """What tells the content of a file."""

    size: int
    """Bytes."""
    sha256: str
    """64 hex digits."""
    etag: str
    """What S3 makes of the content, when it comes in parts of `PART_SIZE`."""


class ObjectAbsentError(MirrorError):
    """The bucket has no object of this name, or another one than a moment ago."""


class Bucket:
    """The objects below `s3://bucket/prefix`, by names relative to it. Every method may raise `MirrorError`."""

    def __init__(self, uri: str, encryption: str | None = None) -> None:
        """Contacts nobody; raises `ConfigError` for what is no such address.

        Args:
            encryption: how the server encrypts what is uploaded: `AES256`, `aws:kms` or `aws:kms:KEY`; None leaves it
                to the bucket's own setting.
        """
        match = re.fullmatch(r"s3://([A-Za-z0-9._-]{3,63})(/.*)?", uri)
        if match is None:
            raise ConfigError(f"{without_secrets(uri)!r} is no address of a bucket; give one like s3://bucket/prefix")
        self._bucket = match[1]
        self._prefix = (match[2] or "").strip("/")
        self._encryption = _encryption_options(encryption)
        self.uri = f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def sizes(self) -> dict[str, int]:
        """Lists all objects with their sizes in bytes."""
        found = {}
        for page in self._pages():
            for entry in page.get("Contents", ()):
                name = entry["Key"].removeprefix(self._below)
                # Consoles make objects that end in a slash; and a name must not lead out of a folder.
                if not {"", ".", ".."} & set(name.split("/")):
                    found[name] = entry["Size"]
        return found

    def folders(self) -> list[str]:
        """Lists the names of the folders right below the prefix."""
        entries = (entry for page in self._pages(Delimiter="/") for entry in page.get("CommonPrefixes", ()))
        return sorted(entry["Prefix"].removeprefix(self._below).rstrip("/") for entry in entries)

    def put(self, name: str, file: BinaryIO, sha256: str | None = None) -> None:
        """Uploads an open file, which may be closed after that, and proves that the object holds it.

        Args:
            sha256: of the file, from whoever has just computed it; None has it read once more. It is needed before
                anything is sent, because S3 takes the metadata of an object before its parts.
        """
        in_parts = file.seek(0, os.SEEK_END) >= PART_SIZE
        file.seek(0)
        if sha256 is None:
            sha256 = sha256_of(file)
            file.seek(0)
        content = _Content(file)
        with self._clear_errors():
            send = self._put_parts if in_parts else self._put_whole
            send(self._place(name), content.parts(), {"Metadata": {"sha256": sha256}, **self._encryption})
            head = self._client.head_object(**self._place(name))
            sent = content.digests()
            if sent.sha256 != sha256:
                raise MirrorError(f"{self.uri}/{name} was changed while it was uploaded; upload it again")
            if (head["ContentLength"], head["ETag"].strip('"')) == (sent.size, sent.etag):
                return
            if _sha256_of_parts(self._content_of(name)) != sha256:
                raise MirrorError(
                    f"{self.uri}/{name} does not hold what was sent; the server or the way to it is faulty"
                )

    def fetch(self, name: str, file: BinaryIO) -> str:
        """Downloads an object into an open file; gives the SHA-256 of what came, and compares it with nothing."""
        digest = hashlib.sha256()
        with self._clear_errors():
            for part in self._content_of(name):
                digest.update(part)
                file.write(part)
        return digest.hexdigest()

    def sha256(self, name: str) -> str | None:
        """Gives the SHA-256 of the file that `put` made an object of; None if something else made it."""
        with self._clear_errors():
            head = self._client.head_object(**self._place(name))
        digest: str | None = head["Metadata"].get("sha256")
        return digest

    def remove(self, name: str) -> None:
        """Removes an object, which may be gone already."""
        with contextlib.suppress(ObjectAbsentError), self._clear_errors():
            self._client.delete_object(**self._place(name))

    @property
    def _below(self) -> str:
        return f"{self._prefix}/" if self._prefix else ""

    def _place(self, name: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._below + name}

    @functools.cached_property
    def _client(self) -> Any:
        import boto3
        from botocore.config import Config

        config = Config(
            retries={"mode": "standard", "total_max_attempts": NUM_ATTEMPTS},
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            # Many servers other than AWS stumble over the newer checksums; ours do not depend on the server.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        # A session of its own, because the one that boto3 shares must not be used by several threads.
        return boto3.session.Session().client("s3", config=config)

    def _pages(self, **options: str) -> Iterator[dict[str, Any]]:
        with self._clear_errors():
            pages = self._client.get_paginator("list_objects_v2")
            yield from pages.paginate(Bucket=self._bucket, Prefix=self._below, **options)

    def _put_whole(self, place: dict[str, str], parts: Iterator[bytes], options: dict[str, Any]) -> None:
        self._client.put_object(**place, Body=b"".join(parts), **options)

    def _put_parts(self, place: dict[str, str], parts: Iterator[bytes], options: dict[str, Any]) -> None:
        upload = place | {"UploadId": self._client.create_multipart_upload(**place, **options)["UploadId"]}

        def send(numbered: tuple[int, bytes]) -> dict[str, Any]:
            number, part = numbered
            etag = self._client.upload_part(**upload, PartNumber=number, Body=part)["ETag"]
            return {"PartNumber": number, "ETag": etag}

        try:
            sent = list(_overlapped(send, enumerate(parts, start=1)))
            self._complete(upload, sent)
        except Exception:
            with contextlib.suppress(Exception):
                self._client.abort_multipart_upload(**upload)
            raise

    def _complete(self, upload: dict[str, str], sent: list[dict[str, Any]]) -> None:
        from botocore.exceptions import ClientError

        try:
            self._client.complete_multipart_upload(**upload, MultipartUpload={"Parts": sent})
        except ClientError as error:
            # An attempt whose answer was lost may have completed it; the proof will tell.
            if error.response["Error"]["Code"] != "NoSuchUpload":
                raise

    def _content_of(self, name: str) -> Iterator[bytes]:
        """Reads an object piece by piece, and all of the same object though it be replaced meanwhile."""
        head = self._client.head_object(**self._place(name))
        size, same = head["ContentLength"], {**self._place(name), "IfMatch": head["ETag"]}
        ranges = [f"bytes={start}-{min(start + PART_SIZE, size) - 1}" for start in range(0, size, PART_SIZE)]
        for pieces in _overlapped(lambda part: self._read_range(same, part), ranges):
            yield from pieces

    def _read_range(self, place: dict[str, str], part: str) -> list[bytes]:
        """Reads a part; botocore tries again what fails before the first byte, and this what breaks off after it."""
        from botocore.exceptions import (
            IncompleteReadError,
            ReadTimeoutError,
            ResponseStreamingError,
        )

        for attempt in range(1, NUM_ATTEMPTS + 1):
            try:
                return list(self._client.get_object(**place, Range=part)["Body"].iter_chunks(PIECE_SIZE))
            except (IncompleteReadError, ReadTimeoutError, ResponseStreamingError):
                if attempt == NUM_ATTEMPTS:
                    raise
            time.sleep(random.random() * 2 ** (attempt - 1))
        raise AssertionError("unreachable")

    @contextlib.contextmanager
    def _clear_errors(self) -> Iterator[None]:
        """Turns what boto3 raises into one sentence; the original is left out, as it may hold credentials."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (BotoCoreError, ClientError, ValueError) as error:
            raise self._worded(error) from None

    def _worded(self, error: Exception) -> MirrorError:
        answer = getattr(error, "response", None) or {}
        code = answer.get("Error", {}).get("Code") or type(error).__name__
        reason = without_secrets(f"{code}: {error}")
        if code in ABSENT:
            return ObjectAbsentError(f"{self.uri} lacks an object that it listed, or has another one there ({reason})")
        if code == "NoSuchBucket":
            return MirrorError(f"{self.uri}: there is no bucket {self._bucket}; create it or correct the address")
        if code in REFUSALS:
            cure = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and what they are allowed to do"
            return MirrorError(f"{self.uri} cannot be used with these credentials ({reason}); {cure}")
        return MirrorError(f"{self.uri} cannot be used ({reason}); check the server, the network and AWS_ENDPOINT_URL")


class _Content:
    """Reads an open file part by part, and digests on the way what is read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self._size = 0
        self._md5_of_parts: list[bytes] = []

    def parts(self) -> Iterator[bytes]:
        """Gives the file from where it stands in parts of `PART_SIZE`, the last one shorter."""
        while part := self._file.read(PART_SIZE):
            self._sha256.update(part)
            self._size += len(part)
            self._md5_of_parts.append(hashlib.md5(part, usedforsecurity=False).digest())
            yield part

    def digests(self) -> Digests:
        """Tells what tells the content that was read so far."""
        joined = b"".join(self._md5_of_parts)
        if self._size < PART_SIZE:
            etag = joined.hex() or hashlib.md5(usedforsecurity=False).hexdigest()
        else:
            etag = f"{hashlib.md5(joined, usedforsecurity=False).hexdigest()}-{len(self._md5_of_parts)}"
        return Digests(self._size, self._sha256.hexdigest(), etag)


def sha256_of(file: BinaryIO) -> str:
    """Reads an open file from where it stands to its end; gives 64 hex digits."""
    return _sha256_of_parts(iter(lambda: file.read(2**20), b""))


def _sha256_of_parts(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _overlapped(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Gives `work(item)` for every item, in order, with `NUM_PARTS_AT_ONCE` of them at work at a time.

    After an error it waits for those that are at work, and raises it.
    """
    at_work: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
    try:
        for item in items:
            at_work.append(_started(work, item))
            if len(at_work) == NUM_PARTS_AT_ONCE:
                yield at_work.popleft().result()
        while at_work:
            yield at_work.popleft().result()
    except Exception:
        concurrent.futures.wait(at_work)
        raise


def _started(work: Callable[[Item], Result], item: Item) -> concurrent.futures.Future[Result]:
    """Starts `work(item)` in a thread of its own."""
    future: concurrent.futures.Future[Result] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(work(item))
        except BaseException as error:
            future.set_exception(error)

    # A daemon, where a pool's threads would keep a process from ending while a server hangs.
    threading.Thread(target=run, name="part of a file", daemon=True).start()
    return future


def _encryption_options(encryption: str | None) -> dict[str, str]:
    """Makes S3's options of `AES256`, `aws:kms` or `aws:kms:KEY`."""
    if encryption is None:
        return {}
    key = encryption.removeprefix("aws:kms").removeprefix(":")
    if encryption == "AES256" or not key:
        return {"ServerSideEncryption": encryption}
    return {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": key}
