"""Search for secrets in everything that a run leaves behind: files, databases, buckets, command lines of processes.

A secret counts as found in any of the forms that programs make of it: as it is, quoted for an address, in base64 at
each of the three places where it may begin, or in hex. Compressed files are looked into as well.
"""

from __future__ import annotations

import base64
import gzip
import sqlite3
import urllib.parse
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

SHORTEST = 8
"""Characters; shorter secrets would be found by chance."""
SQLITE = b"SQLite format 3\x00"


def forms_of(secret: str) -> dict[bytes, str]:
    """Return the forms of a secret to search for, by name."""
    if len(secret) < SHORTEST:
        raise ValueError(f"a secret of {len(secret)} characters would be found by chance; take {SHORTEST} or more")
    plain = secret.encode()
    forms = {
        plain: "plain",
        urllib.parse.quote(secret, safe="").encode(): "quoted",
        urllib.parse.quote_plus(secret).encode(): "quoted",
        plain.hex().encode(): "hex",
    }
    for offset in range(3):
        # What stands before and after the secret changes the characters at both ends, which are therefore left out.
        encoded = base64.b64encode(bytes(offset) + plain)
        inside = encoded[(0, 2, 3)[offset] : len(encoded) - (4 if len(plain) + offset % 3 else 0)]
        forms[inside] = "base64"
        forms[inside.replace(b"+", b"-").replace(b"/", b"_")] = "base64"
    return forms


def in_bytes(content: bytes, secrets: Mapping[str, str]) -> set[str]:
    """Return the secrets, given by name, that the content holds in any form."""
    return {name for name, secret in secrets.items() if any(form in content for form in forms_of(secret))}


def in_folder(folder: Path, secrets: Mapping[str, str], but: Collection[str] = ()) -> list[str]:
    """List the places below a folder that hold a secret: files, names, compressed content, rows of SQLite databases.

    `but` names files, relative to the folder, that may hold them.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name in but:
            continue
        found += [f"{path}: {secret} in the name" for secret in sorted(in_bytes(name.encode(), secrets))]
        if path.is_file() and not path.is_symlink():
            for place, content in _contents(path):
                found += [f"{place}: {secret}" for secret in sorted(in_bytes(content, secrets))]
    return found


def in_sqlite(path: Path, secrets: Mapping[str, str]) -> list[str]:
    """List the tables and columns of a SQLite database, including its log, that have a secret."""
    found = set()
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            rows = connection.execute(f'SELECT * FROM "{table}"')
            columns = [description[0] for description in rows.description]
            for row in rows:
                for column, value in zip(columns, row, strict=True):
                    content = value if isinstance(value, bytes) else str(value).encode()
                    found |= {f"{path}: {secret} in {table}.{column}" for secret in in_bytes(content, secrets)}
    finally:
        connection.close()
    return sorted(found)


def in_text(place: str, text: str, secrets: Mapping[str, str]) -> list[str]:
    """List the lines of a text, such as a dump of a database, that have a secret, by number and never by content."""
    return [
        f"{place}, line {number}: {secret}"
        for number, line in enumerate(text.splitlines(), start=1)
        for secret in sorted(in_bytes(line.encode(), secrets))
    ]


def in_command_lines(secrets: Mapping[str, str]) -> list[str]:
    """List the processes of this machine whose arguments, which everybody can read, have a secret."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        found += [f"process {process.name}: {secret}" for secret in sorted(in_bytes(arguments, secrets))]
    return found


def in_bucket(client: Any, bucket: str, secrets: Mapping[str, str]) -> list[str]:
    """List the objects of a bucket that have a secret in their key, their metadata or their content."""
    found = []
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        for entry in page.get("Contents", ()):
            answer = client.get_object(Bucket=bucket, Key=entry["Key"])
            place = f"s3://{bucket}/{entry['Key']}"
            parts = {
                "key": entry["Key"].encode(),
                "metadata": str(answer["Metadata"]).encode(),
                "content": answer["Body"].read(),
            }
            for part, content in parts.items():
                found += [f"{place}: {secret} in the {part}" for secret in sorted(in_bytes(content, secrets))]
    return found


def _contents(path: Path) -> Iterator[tuple[str, bytes]]:
    """Return a file as it is, and what is packed in it."""
    content = path.read_bytes()
    yield str(path), content
    if content.startswith(SQLITE):
        # Values are not always stored in one piece.
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        try:
            yield f"{path} (dump)", "\n".join(connection.iterdump()).encode()
        finally:
            connection.close()
    elif content.startswith(b"\x1f\x8b"):
        try:
            yield f"{path} (unpacked)", gzip.decompress(content)
        except (OSError, EOFError, zlib.error):
            return
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as packed:
            for name in packed.namelist():
                yield f"{path} ({name})", packed.read(name)
