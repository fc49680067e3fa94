"""Files in an S3 bucket, each proven to be what was sent.

The endpoint, the region and the credentials are those of the standard AWS variables and files; encryption at rest is
the bucket's own setting. Needed are the rights to list, read, write and delete, and to abort multipart uploads. A
writer that is killed may leave parts of an upload that nobody lists: a lifecycle rule should abort such uploads.

After each upload the size and the ETag are compared with the file's, an ETag being the MD5 that S3 defines for whole
objects and for those in parts. Where it is something else, under encryption by KMS say, the object is read back and
compared by SHA-256.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from sfgrpo.errors import ConfigError, MirrorError

PART_SIZE = 16 * 2**20
"""Bytes of a part; files of at least this size go up in parts."""
NUM_ATTEMPTS = 5
"""Tries of one request, with growing pauses of at most 15 seconds together, before it counts as failed."""
CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0

ABSENT = {"404", "NoSuchKey"}
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
SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


class Digests(NamedTuple):
    """What tells the content of a file."""

    size: int
    """Bytes."""
    sha256: str
    """64 hex digits."""
    etag: str
    """What S3 makes of the content, when it comes in parts of `PART_SIZE`."""


class ObjectAbsentError(MirrorError):
    """The bucket has no object of this name, though it was listed a moment ago."""


class Bucket:
    """The objects below `s3://bucket/prefix`, by names relative to it. Every method may raise `MirrorError`."""

    def __init__(self, uri: str) -> None:
        """Contacts nobody; raises `ConfigError` for what is no such address."""
        match = re.fullmatch(r"s3://([A-Za-z0-9._-]{3,63})(/.*)?", uri)
        if match is None:
            raise ConfigError(f"{without_secrets(uri)!r} is no address of a bucket; give one like s3://bucket/prefix")
        self._bucket = match[1]
        self._prefix = (match[2] or "").strip("/")
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

    def put(self, name: str, file: BinaryIO) -> None:
        """Uploads an open file, which may be closed after that, and proves that the object holds it."""
        digests = digests_of(file)
        file.seek(0)
        with self._clear_errors():
            self._client.upload_fileobj(
                file,
                self._bucket,
                self._below + name,
                ExtraArgs={"Metadata": {"sha256": digests.sha256}},
                Config=self._transfer,
            )
            head = self._client.head_object(Bucket=self._bucket, Key=self._below + name)
            if (head["ContentLength"], head["ETag"].strip('"')) == (digests.size, digests.etag):
                return
            if self._sha256_of_content(name) != digests.sha256:
                raise MirrorError(
                    f"{self.uri}/{name} does not hold what was sent; the server or the way to it is faulty"
                )

    def fetch(self, name: str, file: BinaryIO) -> None:
        """Downloads an object into an open file, without looking at what it holds."""
        with self._clear_errors():
            self._client.download_fileobj(self._bucket, self._below + name, file, Config=self._transfer)

    def sha256(self, name: str) -> str | None:
        """Gives the SHA-256 of the file that `put` made an object of; None if something else made it."""
        with self._clear_errors():
            head = self._client.head_object(Bucket=self._bucket, Key=self._below + name)
        digest: str | None = head["Metadata"].get("sha256")
        return digest

    def remove(self, name: str) -> None:
        """Removes an object, which may be gone already."""
        with contextlib.suppress(ObjectAbsentError), self._clear_errors():
            self._client.delete_object(Bucket=self._bucket, Key=self._below + name)

    @property
    def _below(self) -> str:
        return f"{self._prefix}/" if self._prefix else ""

    @functools.cached_property
    def _client(self) -> Any:
        import boto3  # type: ignore[import-untyped]
        from botocore.config import Config  # type: ignore[import-untyped]

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

    @functools.cached_property
    def _transfer(self) -> Any:
        from boto3.s3.transfer import TransferConfig  # type: ignore[import-untyped]

        # Threads of its own would take CPU from training, and keep a process from ending while a server hangs.
        return TransferConfig(multipart_threshold=PART_SIZE, multipart_chunksize=PART_SIZE, use_threads=False)

    def _pages(self, **options: str) -> Iterator[dict[str, Any]]:
        with self._clear_errors():
            pages = self._client.get_paginator("list_objects_v2")
            yield from pages.paginate(Bucket=self._bucket, Prefix=self._below, **options)

    def _sha256_of_content(self, name: str) -> str:
        digest = hashlib.sha256()
        for chunk in self._client.get_object(Bucket=self._bucket, Key=self._below + name)["Body"].iter_chunks(2**20):
            digest.update(chunk)
        return digest.hexdigest()

    @contextlib.contextmanager
    def _clear_errors(self) -> Iterator[None]:
        """Turns what boto3 raises into one sentence; the original is left out, as it may hold credentials."""
        from boto3.exceptions import Boto3Error  # type: ignore[import-untyped]
        from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]
        from s3transfer.exceptions import RetriesExceededError  # type: ignore[import-untyped]

        try:
            yield
        except (BotoCoreError, ClientError, Boto3Error, RetriesExceededError, ValueError) as error:
            raise self._worded(error) from None

    def _worded(self, error: Exception) -> MirrorError:
        code = getattr(error, "response", {}).get("Error", {}).get("Code") or type(error).__name__
        reason = without_secrets(f"{code}: {error}")
        if code in ABSENT:
            return ObjectAbsentError(f"{self.uri} lacks an object that it listed ({reason})")
        if code == "NoSuchBucket":
            return MirrorError(f"{self.uri}: there is no bucket {self._bucket}; create it or correct the address")
        if code in REFUSALS:
            cure = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and what they are allowed to do"
            return MirrorError(f"{self.uri} cannot be used with these credentials ({reason}); {cure}")
        return MirrorError(f"{self.uri} cannot be used ({reason}); check the server, the network and AWS_ENDPOINT_URL")


def digests_of(file: BinaryIO) -> Digests:
    """Reads an open file from where it stands to its end."""
    sha256, size, parts = hashlib.sha256(), 0, []
    while part := file.read(PART_SIZE):
        sha256.update(part)
        size += len(part)
        parts.append(hashlib.md5(part, usedforsecurity=False))
    if size < PART_SIZE:
        whole = parts[0] if parts else hashlib.md5(usedforsecurity=False)
        return Digests(size, sha256.hexdigest(), whole.hexdigest())
    joined = hashlib.md5(b"".join(part.digest() for part in parts), usedforsecurity=False)
    return Digests(size, sha256.hexdigest(), f"{joined.hexdigest()}-{len(parts)}")


def without_secrets(text: str) -> str:
    """Blots out passwords in addresses and the secrets of the environment."""
    text = re.sub(r"://[^/\s]*@", "://***@", text)
    for name in SECRETS:
        if secret := os.environ.get(name, "").strip():
            text = text.replace(secret, "***")
    return text
