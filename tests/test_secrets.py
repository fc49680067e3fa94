"""No credential is left anywhere: first that the search finds what is planted, then that a run leaves nothing."""

from __future__ import annotations

import base64
import gzip
import sqlite3
import subprocess
import sys
import urllib.parse
import zipfile

import pytest
from secrets_search import in_bucket, in_bytes, in_command_lines, in_folder, in_sqlite, in_text

SECRET = "planted/secret+with=signs%and more"
SECRETS = {"KEY": SECRET}


@pytest.mark.parametrize("before", ["", "a", "ab", "abc"])
@pytest.mark.parametrize("after", ["", "z", "yz", "xyz"])
def test_base64_is_found_wherever_the_secret_stands(before, after):
    text = f"{before}{SECRET}{after}".encode()
    assert in_bytes(base64.b64encode(text), SECRETS) == {"KEY"}
    assert in_bytes(base64.urlsafe_b64encode(text), SECRETS) == {"KEY"}


@pytest.mark.parametrize(
    "text", [SECRET, urllib.parse.quote(SECRET, safe=""), urllib.parse.quote_plus(SECRET), SECRET.encode().hex()]
)
def test_every_form_is_found(text):
    assert in_bytes(f"x{text}y".encode(), SECRETS) == {"KEY"}


def test_other_text_is_not_found():
    assert not in_bytes(b"planted/secret+with=signs%and les" * 100, SECRETS)


def test_short_secret_is_refused():
    with pytest.raises(ValueError, match="a secret of 3 characters would be found by chance; take 8 or more"):
        in_bytes(b"", {"KEY": "abc"})


def test_files_names_and_packed_content_are_searched(tmp_path):
    plain = {"KEY": "planted-secret-0123"}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "log").write_text(f"x {plain['KEY']} y")
    (tmp_path / "clean").write_text("nothing")
    (tmp_path / "allowed").write_text(plain["KEY"])
    (tmp_path / f"of-{plain['KEY']}").touch()
    (tmp_path / "packed.gz").write_bytes(gzip.compress(plain["KEY"].encode()))
    with zipfile.ZipFile(tmp_path / "packed.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("inside", plain["KEY"] * 3)
    found = in_folder(tmp_path, plain, but=["allowed"])
    assert [line.partition(": ")[0].removeprefix(f"{tmp_path}/") for line in found] == [
        "a/log",
        f"of-{plain['KEY']}",
        "packed.gz (unpacked)",
        "packed.zip (inside)",
    ]


def test_database_is_searched(tmp_path):
    with sqlite3.connect(tmp_path / "data.db") as connection:
        connection.execute("CREATE TABLE tags (name TEXT, value TEXT)")
        connection.execute("INSERT INTO tags VALUES (?, ?)", ("x", SECRET))
        connection.execute("INSERT INTO tags VALUES (?, ?)", ("y", "z"))
    connection.close()
    assert in_sqlite(tmp_path / "data.db", SECRETS) == [f"{tmp_path}/data.db: KEY in tags.value"]
    assert in_folder(tmp_path, SECRETS)


def test_dump_is_searched_without_showing_what_is_found():
    assert in_text("dump", f"one\nINSERT {SECRET}\nthree", SECRETS) == ["dump, line 2: KEY"]


def test_command_lines_are_searched():
    process = subprocess.Popen([sys.executable, "-c", "input()", SECRET], stdin=subprocess.PIPE)
    try:
        assert in_command_lines(SECRETS) == [f"process {process.pid}: KEY"]
    finally:
        process.communicate(b"\n")


def test_objects_are_searched(s3_server):
    client, bucket = s3_server.client(), "searched"
    plain = {"KEY": "planted-secret-0123"}
    client.create_bucket(Bucket=bucket)
    client.put_object(Bucket=bucket, Key="clean", Body=b"nothing")
    client.put_object(Bucket=bucket, Key="content", Body=plain["KEY"].encode())
    client.put_object(Bucket=bucket, Key="meta", Body=b"", Metadata={"a": plain["KEY"]})
    client.put_object(Bucket=bucket, Key=plain["KEY"], Body=b"")
    found = in_bucket(client, bucket, plain)
    assert {line.rpartition(" ")[2] for line in found} == {"content", "metadata", "key"} and len(found) == 3
