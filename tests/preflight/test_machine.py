"""Disks, locks, packages, proxies and services, each with what is right, doubtful and wrong."""

from __future__ import annotations

import contextlib
import fcntl
import http.server
import importlib.metadata
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sfgrpo.errors import ConfigError, SfgrpoError
from sfgrpo.preflight import machine
from sfgrpo.preflight.checkout import check_packages
from sfgrpo.preflight.machine import check_folder, check_locks, check_memory, describe_device
from sfgrpo.preflight.network import check_prefect, check_proxies, describe_hub
from sfgrpo.preflight.report import Doubt, examine
from sfgrpo.runtime.environment import read_environment

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


def fail(error: Exception) -> str:
    raise error


def test_each_check_is_run_whatever_the_others_find():
    checks = {
        "fine": lambda: "all is well",
        "doubt": lambda: fail(Doubt("perhaps")),
        "wrong": lambda: fail(ConfigError("no")),
        "away": lambda: fail(FileNotFoundError(2, "No such file")),
    }
    found = [(finding.status, finding.name, finding.text) for finding in examine(checks)]
    assert found == [
        ("ok", "fine", "all is well"),
        ("warning", "doubt", "perhaps"),
        ("problem", "wrong", "no"),
        ("problem", "away", "[Errno 2] No such file"),
    ]


def test_folder_that_will_be_made_is_checked_where_it_will_be(tmp_path):
    assert "GB free" in check_folder(tmp_path / "a/b")
    assert check_locks(tmp_path / "a/b") == f"work in {tmp_path}"
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_written_is_refused():
    with pytest.raises(ConfigError, match=r"/proc/new cannot be written \(.*\); correct its rights, or name another"):
        check_folder(Path("/proc/new"))


def test_full_disk_is_doubted(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "ENOUGH_DISK", 10**18)
    with pytest.raises(Doubt, match="GB free; make room"):
        check_folder(tmp_path)


@pytest.mark.parametrize("kind", ["absent", "open to all"])
def test_file_system_without_locks_is_refused(tmp_path, monkeypatch, kind):
    def flock(descriptor: int, operation: int) -> None:
        if kind == "absent":
            raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(
        ConfigError, match=r"has no file locks, .*; set SFGRPO_SCRATCH and MLFLOW_TRACKING_URI to a local"
    ):
        check_locks(tmp_path)


def test_memory_is_compared_with_the_weights(tmp_path, monkeypatch):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/x.safetensors").write_bytes(b"0" * 1000)
    assert "weights of 0.00 GB" in check_memory(tmp_path)
    monkeypatch.setattr(machine, "_free_memory", lambda: 1000)
    with pytest.raises(Doubt, match="which are loaded before they are used"):
        check_memory(tmp_path)


def test_more_threads_than_cores_are_doubted(monkeypatch):
    monkeypatch.setenv("SFGRPO_DEVICE", "cpu")
    monkeypatch.setenv("SFGRPO_NUM_THREADS", "1024")
    with pytest.raises(Doubt, match=r"cpu: 1024 threads on .* cores wait for one another; lower SFGRPO_NUM_THREADS"):
        describe_device(read_environment())
    monkeypatch.setenv("SFGRPO_NUM_THREADS", "1")
    assert describe_device(read_environment()).startswith("cpu: 1 threads on")


def test_installed_packages_are_compared_with_the_lock_file(tmp_path):
    lock = tmp_path / "requirements.lock"
    lock.write_text(
        "pydantic==0.1 \\\n    --hash=sha256:00\nabsent-package==1\nnumpy==1.2+cpu\nscipy==1\n# x==2\n"
        'pywin32==1 ; sys_platform == "win32" \\\n    --hash=sha256:00\n'
    )
    with pytest.raises(
        Doubt, match=r"pydantic .* instead of 0\.1, absent-package none instead of 1, .* and 1 more; run"
    ):
        check_packages(lock)
    with pytest.raises(Doubt, match=r"none\.lock is not here"):
        check_packages(tmp_path / "none.lock")
    lock.write_text(f"pydantic=={importlib.metadata.version('pydantic')} \\\n    --hash=sha256:00\n")
    assert "and the 1 packages of" in check_packages(lock)


def test_moved_environment_is_named_with_the_cure(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/dvc").write_text("#!/old/place/.venv/bin/python\n")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(ConfigError, match=r"was moved: .* want /old/place/\.venv/bin/python; remove the folder"):
        check_packages()


@pytest.fixture
def proxies(monkeypatch):
    """Return a function that sets the variables of proxies."""
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return lambda **values: [monkeypatch.setenv(name.upper(), value) for name, value in values.items()]


def test_proxy_in_front_of_this_machine_is_refused(proxies):
    assert check_proxies({}) == "none"
    proxies(http_proxy="http://user:secret@proxy:3128")
    with pytest.raises(
        ConfigError, match=r"also for 127.0.0.1 and localhost, .*; add 127.0.0.1,localhost to NO_PROXY"
    ) as told:
        check_proxies({})
    assert "secret" not in str(told.value)
    proxies(no_proxy="localhost")
    with pytest.raises(ConfigError, match=r"also for 127.0.0.1, where"):
        check_proxies({})


def test_proxy_in_front_of_a_service_is_doubted(proxies):
    proxies(https_proxy="http://proxy:3128", no_proxy="127.0.0.1,localhost")
    with pytest.raises(Doubt, match="also for MLFLOW_TRACKING_URI; add their hosts to NO_PROXY"):
        check_proxies({"MLFLOW_TRACKING_URI": "https://mlflow.example:5000"})
    proxies(no_proxy="127.0.0.1,localhost,mlflow.example")
    assert "not for this machine" in check_proxies({"MLFLOW_TRACKING_URI": "https://mlflow.example:5000"})


def test_hub_is_described_only_where_it_is_used(monkeypatch):
    from huggingface_hub import constants

    assert describe_hub(is_used=False) == "not used: all models are folders"
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(Doubt, match=r"no token; gated models, such as Stable Diffusion 3.5, need HF_TOKEN"):
        describe_hub(is_used=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert describe_hub(is_used=True).endswith("no token, offline")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    assert describe_hub(is_used=True).endswith("a token, offline")


@contextlib.contextmanager
def answering(status: int, body: str) -> Iterator[str]:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/api"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("status", "body", "complaint"),
    [
        (401, "", "refuses the login; set PREFECT_API_AUTH_STRING to user:password"),
        (404, "", "answers 404; it should end in /api"),
        (200, "<html>", "is no Prefect server .*; it should end in /api"),
    ],
)
def test_wrong_prefect_server_is_named_with_the_cure(monkeypatch, proxies, status, body, complaint):
    with answering(status, body) as address:
        monkeypatch.setenv("PREFECT_API_URL", address)
        with pytest.raises(ConfigError, match=f"PREFECT_API_URL {address} {complaint}"):
            check_prefect()


def test_prefect_server_says_its_version_or_is_away(monkeypatch, proxies):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    assert "each flow starts a server" in check_prefect()
    with answering(200, '"3.8.8"') as address:
        monkeypatch.setenv("PREFECT_API_URL", address)
        assert check_prefect() == f"{address} runs Prefect 3.8.8"
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{unused.getsockname()[1]}/api")
        with pytest.raises(SfgrpoError, match=r"does not answer .*; start the server, or unset the variable"):
            check_prefect()
