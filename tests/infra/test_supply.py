"""What is installed is what the locks say, file by file; and what cannot be audited is never called audited."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import threading
import tomllib
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from infra.supply import audit, images
from infra.supply.lock import LOCKS, MAIN, TORCH, TORCH_CPU, Package, read_lock
from tests.support.paths import ROOT

SUPPLY = ROOT / "infra" / "supply"
ALL = [*LOCKS, TORCH, TORCH_CPU]
DIGEST = f"sha256:{'ab' * 32}"


def versions(*locks: Path) -> dict[str, str]:
    return {canonicalize_name(package.name): package.version for lock in locks for package in read_lock(ROOT / lock)}


def unsatisfied(requirements: list[str], locked: dict[str, str]) -> list[str]:
    parsed = [Requirement(line) for line in requirements]
    return [
        str(requirement)
        for requirement in parsed
        if not requirement.specifier.contains(locked.get(canonicalize_name(requirement.name), "0"), prereleases=True)
        or canonicalize_name(requirement.name) not in locked
    ]


# --- Locks ---


@pytest.mark.parametrize("lock", ALL, ids=str)
def test_every_package_of_a_lock_has_one_version_and_hashes(lock: Path) -> None:
    text = (ROOT / lock).read_text(encoding="utf-8")
    packages = read_lock(ROOT / lock)
    rest = re.sub(r"^#.*\n", "", text, flags=re.M)
    assert rest == "".join(package.text + "\n" for package in packages), "a line that is no package"
    assert len({package.name for package in packages}) == len(packages) > 0
    for package in packages:
        assert package.hashes and len(set(package.hashes)) == len(package.hashes), package.name
        assert package.text.count("--hash") == len(package.hashes), f"{package.name}: a hash that is no SHA-256"


@pytest.mark.parametrize("lock", LOCKS, ids=str)
def test_a_lock_satisfies_the_file_that_it_was_made_from(lock: Path) -> None:
    lines = [line.split("#")[0].strip() for line in (ROOT / LOCKS[lock]).read_text(encoding="utf-8").splitlines()]
    assert not unsatisfied([line for line in lines if line], versions(lock, TORCH) if lock == MAIN else versions(lock))


def test_the_locks_satisfy_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for extra in project["optional-dependencies"].values() for line in extra]
    assert not unsatisfied([*project["dependencies"], *extras], versions(MAIN, TORCH))
    assert unsatisfied(["torch>=99", "absent"], versions(MAIN, TORCH)) == ["torch>=99", "absent"]


def test_what_is_installed_is_in_the_lock_with_all_that_it_needs() -> None:
    """pip installs without looking for dependencies, so that one that the lock lacks would not be there."""
    locked = versions(MAIN, TORCH) | versions(TORCH_CPU)
    installed = {canonicalize_name(each.name): each for each in distributions() if each.name not in ("pip", "sfgrpo")}
    assert {name: each.version.split("+")[0] for name, each in installed.items()} == {
        name: locked[name].split("+")[0] for name in installed
    }
    needed = [Requirement(line) for each in installed.values() for line in each.requires or ()]
    missing = {
        canonicalize_name(requirement.name)
        for requirement in needed
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    } - set(installed)
    assert not missing


@pytest.mark.parametrize("lock", [lock for lock in ALL if lock != MAIN], ids=str)
def test_locks_agree_on_the_packages_that_they_share(lock: Path) -> None:
    main, other = versions(MAIN), versions(lock)
    assert {name: version for name, version in other.items() if name in main} == {
        name: version for name, version in main.items() if name in other
    }


def test_both_builds_of_torch_have_one_version() -> None:
    assert versions(TORCH_CPU)["torch"] == f"{versions(TORCH)['torch']}+cpu"


def test_a_line_without_an_exact_version_is_refused(tmp_path: Path) -> None:
    lock = tmp_path / "loose.lock"
    lock.write_text("# comment\nsix>=1 \\\n    --hash=sha256:00\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="names no exact version"):
        read_lock(lock)


# --- Installing ---


def unchecked(text: str) -> list[str]:
    """Return the commands of a file that install from an index without checking hashes."""
    commands = re.sub(r"\\\n\s*", " ", text).splitlines()
    installs = r"\b(pip3?|uv|pipx|conda|npm)\b[^#`]*\b(install|add|sync|ci)\b"
    return [line for line in commands if re.search(installs, line) and "--require-hashes" not in line]


def test_nothing_is_installed_without_its_hash() -> None:
    shipped = [ROOT / "Makefile", ROOT / ".ci" / "run", *SUPPLY.glob("*.sh"), *(ROOT / "infra").rglob("Dockerfile.*")]
    found = {str(path): unchecked(path.read_text(encoding="utf-8")) for path in shipped}
    assert not any(found.values()), found
    planted = ["python -m pip install six", "pip3 install \\\n  six", "uv pip install six", "RUN npm install x"]
    assert all(unchecked(line) for line in planted)


def make_wheel(folder: Path, *, requires: str = "") -> str:
    """Make a wheel; return its SHA-256."""
    path = folder / "tiny-1.0-py3-none-any.whl"
    metadata = f"Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n{requires}"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny.py", "")
        wheel.writestr("tiny-1.0.dist-info/METADATA", metadata)
        wheel.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tiny-1.0.dist-info/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def install(folder: Path, line: str) -> subprocess.CompletedProcess[str]:
    (folder / "lock").write_text(line + "\n", encoding="utf-8")
    options = ["--no-index", "--find-links", folder, "--target", folder / "installed"]
    command = [SUPPLY / "install.sh", Path(sys.prefix), folder / "lock", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_file_with_its_hash_is_installed_and_what_it_asks_for_is_not(tmp_path: Path) -> None:
    sha256 = make_wheel(tmp_path, requires="Requires-Dist: other\n")
    done = install(tmp_path, f"tiny==1.0 --hash=sha256:{sha256}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "installed" / "tiny.py").exists()


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (f"tiny==1.0 --hash=sha256:{'0' * 64}", "DO NOT MATCH"),
        ("tiny==1.0", "Hashes are required"),
        (f"tiny>=1.0 --hash=sha256:{'0' * 64}", "must have their versions pinned"),
    ],
    ids=["other file", "no hash", "no version"],
)
def test_a_file_that_the_lock_does_not_have_is_refused(tmp_path: Path, line: str, error: str) -> None:
    make_wheel(tmp_path)
    done = install(tmp_path, line)
    assert done.returncode != 0 and error in done.stderr, done.stderr
    assert not (tmp_path / "installed").exists()


def test_a_source_is_not_built(tmp_path: Path) -> None:
    (tmp_path / "tiny-1.0.tar.gz").write_bytes(b"")
    done = install(tmp_path, f"tiny==1.0 --hash=sha256:{hashlib.sha256(b'').hexdigest()}")
    assert done.returncode != 0 and "No matching distribution" in done.stderr


FAKE_PYTHON = """#!/bin/sh
echo "$*" >> {log}
case "$*" in *torch-cpu.lock*) {answer} ;; esac
"""


def install_product(folder: Path, *, torch: str, answer: str) -> tuple[int, str, list[str]]:
    """Install with a pip that answers so when it is asked for torch for CPUs; return what it was asked for."""
    log, python = folder / "log", folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text(FAKE_PYTHON.format(log=log, answer=answer), encoding="utf-8")
    python.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "TORCH": torch}
    command = [SUPPLY / "install_product.sh", folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    asked = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    assert all("--require-hashes" in line and "--no-deps" in line for line in asked)
    return done.returncode, done.stderr, [Path(found).name for line in asked for found in re.findall(r"\S+lock", line)]


NOT_FOUND = "echo ERROR: No matching distribution found >&2; exit 1"
REST = ["build.lock", "requirements.lock"]


@pytest.mark.parametrize(
    ("torch", "answer", "asked"),
    [
        ("", "exit 0", ["torch-cpu.lock", *REST]),
        ("", NOT_FOUND, ["torch-cpu.lock", "torch.lock", *REST]),
        ("cpu", "exit 0", ["torch-cpu.lock", *REST]),
        ("pypi", NOT_FOUND, ["torch.lock", *REST]),
    ],
    ids=["found", "not found", "cpu", "pypi"],
)
def test_torch_is_the_build_that_is_asked_for_or_found(
    tmp_path: Path, torch: str, answer: str, asked: list[str]
) -> None:
    assert install_product(tmp_path, torch=torch, answer=answer) == (0, "", asked)


@pytest.mark.parametrize(
    ("torch", "answer", "error"),
    [
        ("", "echo THESE PACKAGES DO NOT MATCH >&2; exit 1", "DO NOT MATCH"),
        ("cpu", NOT_FOUND, "No matching distribution"),
        ("cuda", "exit 0", "TORCH is 'cuda'; it may be cpu or pypi."),
    ],
    ids=["other file", "not found", "unknown"],
)
def test_another_build_of_torch_replaces_none_that_was_refused(
    tmp_path: Path, torch: str, answer: str, error: str
) -> None:
    status, errors, asked = install_product(tmp_path, torch=torch, answer=answer)
    assert status != 0 and error in errors and "torch.lock" not in asked and "requirements.lock" not in asked


# --- Audit ---


@pytest.fixture
def service(request: pytest.FixtureRequest) -> Iterator[str]:
    """Serve one status and body, whatever is asked."""
    status, body = request.param

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/pypi"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "service",
    [(404, b""), (500, b"{}"), (200, b"<html>"), (200, b"[]"), (200, b"{}"), (200, b'{"vulnerabilities": []}')],
    indirect=True,
    ids=["absent", "broken", "a page", "a list", "without the field", "knows nothing"],
)
def test_a_service_that_knows_no_vulnerability_is_not_relied_on(
    service: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit, "SERVICE", service)
    monkeypatch.setattr(audit, "audit", lambda lock: pytest.fail("audited without a list"))
    assert [audit.main([]), audit.main(["--probe"])] == [audit.UNREACHABLE] * 2
    assert capsys.readouterr().out.startswith("NOT AUDITED for known vulnerabilities: ")


def test_a_service_that_does_not_answer_is_not_relied_on() -> None:
    assert "does not answer" in audit.why_unreachable("http://127.0.0.1:9/pypi")


@pytest.mark.parametrize("service", [(200, b'{"vulnerabilities": [{"id": "PYSEC-1"}]}')], indirect=True)
@pytest.mark.parametrize("bad", [None, MAIN, TORCH], ids=str)
def test_every_lock_is_audited_and_one_finding_fails(
    service: str, bad: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    audited: list[str] = []
    monkeypatch.setattr(audit, "SERVICE", service)
    monkeypatch.setattr(audit, "audit", lambda lock: audited.append(lock) or int(lock == str(bad)))
    assert audit.main([]) == (1 if bad else 0)
    assert audited == [str(lock) for lock in [*LOCKS, TORCH]]
    assert audit.main(["--probe"]) == 0 and len(audited) == len(LOCKS) + 1


def test_a_package_that_cannot_be_looked_up_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "pip-audit"
    program.write_text('#!/bin/sh\ncase "$*" in *--strict*--require-hashes*--requirement*) exit 7 ;; esac\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert audit.audit("requirements.lock") == 7


# --- Images ---


def test_every_image_is_seen_and_has_an_exact_tag() -> None:
    found = {image for path in images.files(ROOT) for image, _ in images.images(path.read_text(encoding="utf-8"))}
    assert {image.split(":")[0] for image in found} >= {"python", "postgres", "ghcr.io/mlflow/mlflow"}
    assert all(re.search(r":v?\d+\.\d+", image) for image in found), found


DOCKER = """#!/bin/sh
test "$1 $2 $3 $4" = "buildx imagetools inspect --format" || exit 9
{answer}
"""


def put_docker(folder: Path, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    (folder / "docker").write_text(DOCKER.format(answer=answer), encoding="utf-8")
    (folder / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_every_image_of_others_is_pinned_once_and_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "infra" / "docker", tmp_path / "infra" / "docker")
    shutil.copytree(ROOT / "infra" / "kubernetes", tmp_path / "infra" / "kubernetes")
    shutil.copy(ROOT / "infra" / "compose.yaml", tmp_path / "infra" / "compose.yaml")
    monkeypatch.setattr(images, "ROOT", tmp_path)
    put_docker(tmp_path, monkeypatch, f"echo '{json.dumps({'digest': DIGEST})}'")
    assert images.main([]) == 1
    assert images.main(["--pin"]) == 0
    assert images.main([]) == 0
    pinned = {path: path.read_text(encoding="utf-8") for path in images.files(tmp_path)}
    assert images.main(["--pin"]) == 0
    assert {path: path.read_text(encoding="utf-8") for path in pinned} == pinned
    for path, text in pinned.items():
        before = (ROOT / path.relative_to(tmp_path)).read_text(encoding="utf-8")
        assert re.sub("@sha256:[0-9a-f]{64}", "", text) == re.sub("@sha256:[0-9a-f]{64}", "", before)
    compose = pinned[tmp_path / "infra" / "compose.yaml"]
    assert f"image: postgres:17.10-bookworm@{DIGEST}\n" in compose and "image: sfgrpo:0.1.0-cpu\n" in compose


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ("echo no such host >&2; exit 1", "cannot be looked up: no such host"),
        ("""echo '{"digest": "latest"}'""", "is no digest"),
    ],
    ids=["unreachable", "nonsense"],
)
def test_a_digest_that_is_not_known_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, error: str
) -> None:
    put_docker(tmp_path, monkeypatch, answer)
    with pytest.raises(SystemExit, match=error):
        images.look_up("postgres:17.10-bookworm")


def test_pinning_needs_docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="docker is not installed"):
        images.look_up("postgres:17.10-bookworm")


def test_a_lock_reads_back_as_it_was_written() -> None:
    (package,) = read_lock(ROOT / TORCH_CPU)
    assert isinstance(package, Package) and package.name == "torch" and len(package.hashes) == 2
