import contextlib
import errno
import os
import pickle
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sfgrpo.errors import IntegrityError
from sfgrpo.runtime.files import atomic_directory, atomic_write, remove_directory, remove_partials, temporary_directory
from sfgrpo.runtime.locks import exclusive_lock
from sfgrpo.runtime.manifest import sha256_of_file, verify_manifest, write_manifest

ABC_SHA256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def manifested(tmp_path) -> Path:
    directory = tmp_path / "checkpoint"
    (directory / "sub").mkdir(parents=True)
    (directory / "a.txt").write_bytes(b"abc")
    (directory / "sub" / "b.bin").write_bytes(bytes(1000))
    write_manifest(directory)
    return directory


def test_file_is_written_as_given(tmp_path):
    atomic_write(tmp_path / "deep" / "text", "grün\n")
    atomic_write(tmp_path / "deep" / "bytes", b"\x00\r\n")
    assert (tmp_path / "deep" / "text").read_bytes() == "grün\n".encode()
    assert (tmp_path / "deep" / "bytes").read_bytes() == b"\x00\r\n"
    assert names(tmp_path / "deep") == ["bytes", "text"]


def test_file_keeps_its_content_when_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    atomic_write(tmp_path / "file", "old")

    def full_disk(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_file_gets_the_permissions_of_any_other(tmp_path):
    (tmp_path / "plain").touch()
    atomic_write(tmp_path / "file", "x")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_directory_appears_only_when_it_is_complete(tmp_path):
    target = tmp_path / "out"
    with atomic_directory(target) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "file").write_text("x")
        assert not target.exists()
    assert (target / "sub" / "file").read_text() == "x"
    assert names(tmp_path) == ["out"]


def test_directory_replaces_the_one_before(tmp_path):
    for name in ("old", "new"):
        with atomic_directory(tmp_path / "out") as partial:
            (partial / name).touch()
    assert names(tmp_path / "out") == ["new"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failed_directory_vanishes_and_the_one_before_stays(tmp_path, error):
    with atomic_directory(tmp_path / "out") as partial:
        (partial / "old").touch()
    with pytest.raises(error), atomic_directory(tmp_path / "out") as partial:
        (partial / "new").touch()
        raise error
    assert names(tmp_path / "out") == ["old"]
    assert names(tmp_path) == ["out"]


def test_removed_directory_leaves_nothing(tmp_path):
    (tmp_path / "out" / "sub").mkdir(parents=True)
    remove_directory(tmp_path / "out")
    assert names(tmp_path) == []


def test_leftovers_of_a_killed_writer_are_removed_at_the_next_start(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from sfgrpo.runtime.files import atomic_directory\n"
        "with atomic_directory(Path(sys.argv[1])) as partial:\n"
        "    (partial / 'half').touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")])
    assert killed.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 1
    atomic_write(tmp_path / "file", "x")
    assert names(tmp_path) == ["file"]


def test_work_of_a_living_writer_is_left_alone(tmp_path):
    with atomic_directory(tmp_path / "out") as partial:
        (partial / "half").touch()
        code = "import sys; from pathlib import Path; from sfgrpo.runtime.files import remove_partials;"
        subprocess.run([sys.executable, "-c", code + "remove_partials(Path(sys.argv[1]))", str(tmp_path)], check=True)
        remove_partials(tmp_path)
        assert names(partial) == ["half"]
    assert names(tmp_path / "out") == ["half"]


def test_file_is_no_leftover_before_its_writer_could_lock_it(tmp_path, monkeypatch):
    touch = Path.touch

    def touch_and_clean(path):
        touch(path)
        remove_partials(path.parent)
        assert path.exists()

    monkeypatch.setattr(Path, "touch", touch_and_clean)
    atomic_write(tmp_path / "file", "x")


def test_two_writers_in_one_directory_do_not_disturb_each_other(tmp_path):
    code = (
        "import sys; from pathlib import Path; from sfgrpo.runtime.files import atomic_write\n"
        "for index in range(200): atomic_write(Path(sys.argv[1]) / f'{sys.argv[2]}-{index % 3}', str(index))\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name]) for name in ("a", "b")]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert names(tmp_path) == ["a-0", "a-1", "a-2", "b-0", "b-1", "b-2"]


@pytest.mark.parametrize("context", [lambda path: atomic_directory(path), lambda path: temporary_directory(path, "x")])
def test_partial_directory_may_be_filled_atomically(tmp_path, context):
    code = "import sys; from pathlib import Path; from sfgrpo.runtime.files import remove_partials;"
    with context(tmp_path / "out") as partial:
        with atomic_directory(partial / "sub") as nested:
            atomic_write(nested / "file", "x")
            for folder in (tmp_path, partial, nested):
                subprocess.run([sys.executable, "-c", code + "remove_partials(Path(sys.argv[1]))", folder], check=True)
        atomic_write(partial / "file", "y")
        assert names(partial) == ["file", "sub"]
        assert names(partial / "sub") == ["file"]


def test_temporary_directory_vanishes_with_its_block_or_with_the_next_one(tmp_path):
    with temporary_directory(tmp_path / "scratch", "ranks") as folder:
        (folder / "log").touch()
        assert folder.parent == tmp_path / "scratch"
    assert names(tmp_path / "scratch") == []
    code = (
        "import os, sys; from pathlib import Path; from sfgrpo.runtime.files import temporary_directory\n"
        "with temporary_directory(Path(sys.argv[1]), 'ranks'): os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "scratch")], check=True)
    assert len(names(tmp_path / "scratch")) == 1
    with temporary_directory(tmp_path / "scratch", "ranks"):
        assert len(names(tmp_path / "scratch")) == 1
    assert names(tmp_path / "scratch") == []


def test_digest_is_that_of_the_standard(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_of_file(tmp_path / "abc") == ABC_SHA256


def test_manifest_of_untouched_files_is_verified(manifested):
    verify_manifest(manifested)


def test_manifest_names_file_and_both_digests_of_a_changed_file(manifested):
    (manifested / "a.txt").write_bytes(b"abd")
    found = sha256_of_file(manifested / "a.txt")
    with pytest.raises(
        IntegrityError, match=rf"a\.txt is damaged: expected sha256 {ABC_SHA256} .*found sha256 {found}"
    ):
        verify_manifest(manifested)


def test_manifest_finds_a_single_flipped_bit(manifested):
    content = bytearray((manifested / "sub" / "b.bin").read_bytes())
    content[500] ^= 1
    (manifested / "sub" / "b.bin").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"sub/b\.bin is damaged"):
        verify_manifest(manifested)


def test_manifest_finds_a_truncated_file(manifested):
    os.truncate(manifested / "sub" / "b.bin", 999)
    with pytest.raises(IntegrityError, match=r"of 1000 bytes, found .* of 999 bytes"):
        verify_manifest(manifested)


def test_manifest_finds_a_missing_file(manifested):
    (manifested / "a.txt").unlink()
    with pytest.raises(
        IntegrityError, match=rf"a\.txt is damaged: expected sha256 {ABC_SHA256} of 3 bytes, found no file"
    ):
        verify_manifest(manifested)


def test_manifest_finds_an_extra_file(manifested):
    (manifested / "sub" / "extra").write_bytes(b"abc")
    with pytest.raises(IntegrityError, match=rf"extra is damaged: expected no file, found sha256 {ABC_SHA256}"):
        verify_manifest(manifested)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": 3}', '{"files": {"a.txt": {"size": 3}}}'])
def test_damaged_manifest_is_an_integrity_error(manifested, content):
    (manifested / "manifest.json").write_text(content)
    with pytest.raises(IntegrityError, match=r"manifest\.json is damaged: expected a manifest"):
        verify_manifest(manifested)


def test_missing_manifest_is_an_integrity_error(tmp_path):
    with pytest.raises(IntegrityError, match=r"manifest\.json is damaged: .* found no file"):
        verify_manifest(tmp_path)


def test_unreadable_file_is_an_integrity_error(manifested):
    (manifested / "a.txt").unlink()
    (manifested / "a.txt").symlink_to(manifested / "nowhere")
    with pytest.raises(IntegrityError, match="found an unreadable file"):
        verify_manifest(manifested)


def test_integrity_error_survives_pickling():
    error = IntegrityError(Path("x"), "one", "other")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "x is damaged: expected one, found other"


def test_a_lock_has_one_user_at_a_time_and_goes_with_its_process(tmp_path):
    lock = tmp_path / "folder" / ".lock"
    code = "import sys, pathlib, time; from sfgrpo.runtime.locks import exclusive_lock\n"
    code += "with exclusive_lock(pathlib.Path(sys.argv[1])) as alone: print(alone, flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"True\n"
        with exclusive_lock(lock) as alone:
            assert not alone
    finally:
        holder.kill()
        holder.communicate()
    with exclusive_lock(lock) as alone:
        assert alone


def test_a_lock_is_waited_for_but_not_for_ever(tmp_path):
    lock = tmp_path / ".lock"
    with ThreadPoolExecutor() as pool, contextlib.ExitStack() as held:
        assert held.enter_context(exclusive_lock(lock))

        def take(timeout_s: float) -> bool:
            with exclusive_lock(lock, timeout_s) as alone:
                return alone

        waiting = pool.submit(take, 20.0)
        assert not pool.submit(take, 0.5).result()
        assert not waiting.done()
        held.close()
        assert waiting.result()
