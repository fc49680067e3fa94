"""Objects in an S3 bucket, each verified after its upload.

boto3's transfer manager is no substitute: its threads keep the process alive while a server hangs, it retries broken
downloads without a pause, and without threads it sends one part at a time, which took 1.6 times as long.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import random
import re
import time
from collections.abc import Iterator
from io import BufferedReader
from typing import Any, BinaryIO

from sfgrpo.errors import ConfigError, MirrorError
from sfgrpo.runtime.redaction import without_secrets
from sfgrpo.storage.parts import PART_SIZE, FileParts, overlapped

PIECE_SIZE = 2**18
"""Bytes to read from the network at a time; reading whole parts takes twice the CPU time."""
NUM_ATTEMPTS = 5
"""Attempts of one request that fails by the network or the server, with growing pauses of at most 15 s in total."""
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


class ObjectAbsentError(MirrorError):
    """An object does not exist, or was replaced during a download."""


class Bucket:
    """The objects below `s3://bucket/prefix`, by name relative to it. Every method may raise `MirrorError`."""

    def __init__(self, uri: str, encryption: str | None = None) -> None:
        """Set up access without contacting the server; raise `ConfigError` for an invalid address.

        Args:
            encryption: server-side encryption of uploads: `AES256`, `aws:kms` or `aws:kms:KEY`; None uses the
                bucket's default.
        """
        match = re.fullmatch(r"s3://([A-Za-z0-9._-]{3,63})(/.*)?", uri)
        if match is None:
            raise ConfigError(
                f"{without_secrets(uri)!r} is not the address of a bucket; use one like s3://bucket/prefix"
            )
        self._bucket = match[1]
        prefix = (match[2] or "").strip("/")
        self._below = f"{prefix}/" if prefix else ""
        self._encryption = _encryption_options(encryption)
        self.uri = f"s3://{self._bucket}/{prefix}".rstrip("/")

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of every object."""
        found = {}
        for page in self._pages():
            for entry in page.get("Contents", ()):
                name = entry["Key"].removeprefix(self._below)
                # S3 consoles create objects that end in a slash; and no name may lead out of a folder.
                if not {"", ".", ".."} & set(name.split("/")):
                    found[name] = entry["Size"]
        return found

    def folders(self) -> list[str]:
        """Return the names of the folders directly below the prefix."""
        entries = (entry for page in self._pages(Delimiter="/") for entry in page.get("CommonPrefixes", ()))
        return sorted(entry["Prefix"].removeprefix(self._below).rstrip("/") for entry in entries)

    def put(self, name: str, file: BufferedReader, sha256: str | None = None) -> None:
        """Upload an open file and verify that the object holds it.

        Args:
            sha256: digest of the file, if just computed; otherwise the file is read once more. It is needed before
                the upload, because S3 takes the metadata of an object before its parts.
        """
        send = self._put_parts if file.seek(0, os.SEEK_END) >= PART_SIZE else self._put_whole
        file.seek(0)
        if sha256 is None:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
        parts = FileParts(file)
        with _as_mirror_error(self.uri):
            send(self._place(name), parts, {"Metadata": {"sha256": sha256}, **self._encryption})
            head = self._client.head_object(**self._place(name))
            if parts.sha256 != sha256:
                raise MirrorError(f"{self.uri}/{name} changed during its upload; upload it again")
            if (head["ContentLength"], head["ETag"].strip('"')) == (parts.size, parts.etag):
                return
        # An ETag may be something else than an MD5, as under encryption by KMS.
        with open(os.devnull, "wb") as nowhere:
            if self.fetch(name, nowhere) != sha256:
                raise MirrorError(f"{self.uri}/{name} is not what was sent; check the server and the network")

    def fetch(self, name: str, file: BinaryIO) -> str:
        """Download an object to an open file; return the SHA-256 of the download, which the caller has to compare."""
        digest = hashlib.sha256()
        with _as_mirror_error(self.uri):
            for part in self._content_of(name):
                digest.update(part)
                file.write(part)
        return digest.hexdigest()

    def sha256(self, name: str) -> str | None:
        """Return the SHA-256 of the file that `put` uploaded; None if the object was not made by `put`."""
        with _as_mirror_error(self.uri):
            head = self._client.head_object(**self._place(name))
        digest: str | None = head["Metadata"].get("sha256")
        return digest

    def remove(self, name: str) -> None:
        """Remove an object; do nothing if there is none."""
        with contextlib.suppress(ObjectAbsentError), _as_mirror_error(self.uri):
            self._client.delete_object(**self._place(name))

    def _place(self, name: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._below + name}

    @functools.cached_property
    def _client(self) -> Any:
        return _connect()

    def _pages(self, **options: str) -> Iterator[dict[str, Any]]:
        with _as_mirror_error(self.uri):
            pages = self._client.get_paginator("list_objects_v2")
            yield from pages.paginate(Bucket=self._bucket, Prefix=self._below, **options)

    def _put_whole(self, place: dict[str, str], parts: FileParts, options: dict[str, Any]) -> None:
        self._client.put_object(**place, Body=b"".join(parts), **options)

    def _put_parts(self, place: dict[str, str], parts: FileParts, options: dict[str, Any]) -> None:
        upload = place | {"UploadId": self._client.create_multipart_upload(**place, **options)["UploadId"]}

        def send(numbered: tuple[int, bytes]) -> dict[str, Any]:
            number, part = numbered
            etag = self._client.upload_part(**upload, PartNumber=number, Body=part)["ETag"]
            return {"PartNumber": number, "ETag": etag}

        try:
            sent = list(overlapped(send, enumerate(parts, start=1)))
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
            # An earlier attempt may have completed it although its response was lost; `put` verifies that.
            if error.response["Error"]["Code"] != "NoSuchUpload":
                raise

    def _content_of(self, name: str) -> Iterator[bytes]:
        """Yield the content of an object; fail if it is replaced midway (`IfMatch`)."""
        head = self._client.head_object(**self._place(name))
        size, same = head["ContentLength"], {**self._place(name), "IfMatch": head["ETag"]}
        ranges = [f"bytes={start}-{min(start + PART_SIZE, size) - 1}" for start in range(0, size, PART_SIZE)]
        for pieces in overlapped(lambda part: self._read_range(same, part), ranges):
            yield from pieces

    def _read_range(self, place: dict[str, str], part: str) -> list[bytes]:
        """Download a range; botocore retries failures before the first byte, this function those after it."""
        from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError

        for attempt in range(1, NUM_ATTEMPTS + 1):
            try:
                return list(self._client.get_object(**place, Range=part)["Body"].iter_chunks(PIECE_SIZE))
            except (IncompleteReadError, ReadTimeoutError, ResponseStreamingError):
                if attempt == NUM_ATTEMPTS:
                    raise
            time.sleep(random.random() * 2 ** (attempt - 1))
        raise AssertionError("unreachable")


def _connect() -> Any:
    import boto3
    from botocore.config import Config

    config = Config(
        retries={"mode": "standard", "total_max_attempts": NUM_ATTEMPTS},
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        # Many servers other than AWS do not support the newer checksums; ours need no support.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    # boto3's shared default session is not thread-safe.
    return boto3.session.Session().client("s3", config=config)


@contextlib.contextmanager
def _as_mirror_error(uri: str) -> Iterator[None]:
    """Turn errors of boto3 into one sentence, without the original, which may contain credentials."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError, ValueError) as error:
        raise _mirror_error(uri, error) from None


def _mirror_error(uri: str, error: Exception) -> MirrorError:
    response = getattr(error, "response", None) or {}
    code = response.get("Error", {}).get("Code") or type(error).__name__
    reason = without_secrets(f"{code}: {error}")
    if code in ABSENT:
        return ObjectAbsentError(f"an object of {uri} was removed or replaced meanwhile ({reason})")
    if code == "NoSuchBucket":
        return MirrorError(f"{uri}: there is no such bucket; create it or correct the address")
    if code in REFUSALS:
        cure = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and what they are allowed to do"
        return MirrorError(f"{uri} cannot be used with these credentials ({reason}); {cure}")
    return MirrorError(f"{uri} cannot be used ({reason}); check the server, the network and AWS_ENDPOINT_URL")


def _encryption_options(encryption: str | None) -> dict[str, str]:
    """Return the request options for `AES256`, `aws:kms` or `aws:kms:KEY`."""
    if encryption is None:
        return {}
    key = encryption.removeprefix("aws:kms").removeprefix(":")
    if encryption == "AES256" or not key:
        return {"ServerSideEncryption": encryption}
    return {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": key}
