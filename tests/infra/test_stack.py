"""The local stack as far as it goes without starting anything: settings, secrets, refusals, what supervisord reads."""

from __future__ import annotations

import base64
import dataclasses
import http.server
import json
import os
import re
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from supervisor.options import ServerOptions

from infra.stack.__main__ import main
from infra.stack.addresses import own_hosts, own_origins
from infra.stack.clients import client_environment, env_file
from infra.stack.credentials import Secrets, ensure_secrets
from infra.stack.errors import StackError, UnhealthyError
from infra.stack.folder import MAX_SOCKET_LENGTH, Folder, make_folder, open_folder, start_stop_lock
from infra.stack.health import get_json, post_json, require_answer
from infra.stack.orphans import end_orphans, processes
from infra.stack.program import Stack
from infra.stack.programs.mlflow import MLFLOW
from infra.stack.programs.postgres import binaries, require_reachable
from infra.stack.programs.prefect import PREFECT
from infra.stack.programs.prefect import client_environment as prefect_environment
from infra.stack.programs.table import PROGRAMS
from infra.stack.programs.webhook import WEBHOOK
from infra.stack.running import is_still_run
from infra.stack.settings import (
    PREFIX,
    Settings,
    dump_settings,
    open_doors,
    parse_settings,
    read_settings,
    require_free_ports,
    require_ordinary_user,
)
from infra.stack.supervision import configuration, running_supervisor
from sfgrpo.errors import ConfigError
from tests.support.stack import BELOW_EPHEMERAL, PORTS, free_ports

IS_ROOT = os.geteuid() == 0


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder for stacks: that of a test may be too deep for a socket."""
    with tempfile.TemporaryDirectory(prefix="s", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def folder(short_path: Path) -> Folder:
    made = open_folder(short_path / "s")
    make_folder(made)
    return made


def set_up(folder: Folder, **variables: str) -> Stack:
    return Stack(settings=Settings.model_validate(variables), folder=folder, secrets=ensure_secrets(folder.secrets))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def values(secrets: Secrets) -> list[str]:
    return list(dataclasses.asdict(secrets).values())


# --- Settings ---


def test_every_setting_comes_from_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "STACK_DIR": "/elsewhere",
        "STACK_HOST": "192.0.2.1",
        "STACK_POSTGRES_PORT": "1",
        "STACK_S3_PORT": "2",
        "STACK_MLFLOW_PORT": "3",
        "STACK_PREFECT_PORT": "4",
        "STACK_WEBHOOK_PORT": "5",
        "STACK_AUTH": "true",
        "STACK_ALLOW_ROOT": "true",
        "STACK_ORIGINS": "https://prefect.example",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    settings = read_settings()
    assert (settings.folder, str(settings.host), settings.auth) == (Path("/elsewhere"), "192.0.2.1", True)
    assert settings.ports == dict(zip(PORTS, range(1, 6), strict=True))
    assert (settings.allow_root, settings.further_origins) == (True, ["https://prefect.example"])
    assert settings.chosen.keys() == given.keys()


def test_without_variables_the_stack_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STACK_HOST", "")
    settings = read_settings()
    assert (settings.is_exposed, settings.auth, settings.allow_root, settings.chosen) == (False, True, False, {})
    assert open_doors(settings) == []
    assert settings.folder == Path(".stack")


def test_an_unknown_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STACK_MLFLOW_PROT", "1")
    with pytest.raises(ConfigError, match=r"STACK_MLFLOW_PROT: unknown key; .* did you mean STACK_MLFLOW_PORT\?"):
        read_settings()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"STACK_S3_PORT": "0"}, "STACK_S3_PORT: '0': Input should be greater than or equal to 1; correct or unset"),
        ({"STACK_HOST": "localhost"}, "STACK_HOST: 'localhost': Input is not a valid IPv4 address; correct or unset"),
        ({"STACK_AUTH": "perhaps"}, "STACK_AUTH: 'perhaps': Input should be a valid boolean"),
        ({"STACK_S3_PORT": "5000"}, "STACK_S3_PORT and STACK_MLFLOW_PORT are both 5000; change one of them"),
        ({"STACK_HOST": "0.0.0.0", "STACK_AUTH": "false"}, "STACK_AUTH is off, but STACK_HOST 0.0.0.0 lets other"),
        ({"STACK_HOST": "192.0.2.1", "STACK_AUTH": "off"}, "STACK_AUTH is off, but STACK_HOST 192.0.2.1 lets other"),
        ({"STACK_ALLOW_ROOT": "true", "STACK_AUTH": "0"}, "every user of this machine would be root; unset one of the"),
        ({"STACK_ORIGINS": "*"}, "STACK_ORIGINS: '*' is no address such as https://prefect.example"),
        ({"STACK_ORIGINS": "https://*.example"}, "STACK_ORIGINS: 'https://*.example' is no address"),
        ({"STACK_ORIGINS": "https://a.example, b.example"}, "STACK_ORIGINS: 'b.example' is no address"),
        ({"STACK_ORIGINS": "https://a.example/"}, "STACK_ORIGINS: 'https://a.example/' is no address"),
    ],
)
def test_a_wrong_setting_is_told_in_one_line(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["up"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: environment: ") and message in line


@pytest.mark.parametrize(
    ("variables", "asks", "local_host"),
    [
        ({}, True, "127.0.0.1"),
        ({"STACK_AUTH": "false"}, False, "127.0.0.1"),
        ({"STACK_HOST": "127.0.0.2"}, True, "127.0.0.2"),
        ({"STACK_HOST": "0.0.0.0"}, True, "127.0.0.1"),
        ({"STACK_HOST": "192.0.2.1"}, True, "192.0.2.1"),
    ],
)
def test_a_login_is_asked_for_unless_it_is_switched_off(variables: dict[str, str], asks: bool, local_host: str) -> None:
    settings = Settings.model_validate(variables)
    assert (settings.auth, settings.local_host) == (asks, local_host)


def test_what_was_switched_off_is_told_at_every_start_and_status(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STACK_DIR", str(folder.root))
    settings = Settings.model_validate({"STACK_AUTH": "false"})
    folder.settings.write_text(dump_settings(settings), encoding="utf-8")
    main(["status"])
    assert capsys.readouterr().err.startswith("WARNING: STACK_AUTH is off: every user and every program of this machi")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    (warning,) = open_doors(Settings.model_validate({"STACK_ALLOW_ROOT": "true"}))
    assert "flows run as root" in warning


def test_root_is_refused_unless_it_is_allowed(
    short_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STACK_DIR", str(short_path / "s"))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert main(["up"]) == 2
    assert "error: root would run the stack, and a flow run could do everything" in capsys.readouterr().err
    assert not (short_path / "s").exists()
    require_ordinary_user(Settings.model_validate({"STACK_ALLOW_ROOT": "true"}))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    require_ordinary_user(Settings())


def test_settings_of_an_earlier_version_are_read_as_the_defaults(tmp_path: Path) -> None:
    assert parse_settings(tmp_path, '{"STACK_AUTH": null}').auth


def test_settings_are_read_back_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.model_validate({"STACK_DIR": tmp_path, "STACK_HOST": "192.0.2.1", "STACK_S3_PORT": "12345"})
    monkeypatch.setenv("STACK_S3_PORT", "54321")
    assert parse_settings(tmp_path, dump_settings(settings)) == settings


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "0.0.0.0"])
def test_a_taken_port_is_named_with_its_variable(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (free,) = free_ports(1)
        settings = Settings.model_validate({"STACK_HOST": host, "STACK_S3_PORT": port, "STACK_WEBHOOK_PORT": free})
        with pytest.raises(
            ConfigError, match=rf"port {port} cannot be used \(Address already in use\); choose another by STACK_S3_PO"
        ):
            require_free_ports(settings, ["STACK_S3_PORT"])
        require_free_ports(settings, ["STACK_WEBHOOK_PORT"])


def test_a_taken_port_keeps_everything_from_being_made(
    short_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, port in zip(PORTS, free_ports(len(PORTS)), strict=True):
        monkeypatch.setenv(name, str(port))
    monkeypatch.setenv("STACK_DIR", str(short_path / "s"))
    monkeypatch.setenv("STACK_ALLOW_ROOT", "true")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("STACK_PREFECT_PORT", str(taken.getsockname()[1]))
        assert main(["up"]) == 2
    assert "choose another by STACK_PREFECT_PORT" in capsys.readouterr().err
    assert not (short_path / "s").exists()


def test_every_port_has_a_setting() -> None:
    assert {program.port for program in PROGRAMS.values() if program.port is not None} <= Settings().ports.keys()


def test_ports_for_tests_are_none_that_a_client_may_get() -> None:
    first, _ = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="utf-8").split()
    assert max(BELOW_EPHEMERAL) < int(first)


# --- Folder ---


def test_others_see_nothing_in_the_folder(folder: Folder) -> None:
    passage = 0o711 if IS_ROOT else 0o700
    assert [mode(path) for path in (folder.root, folder.root / "data")] == [passage] * 2
    assert [mode(path) for path in (folder.private, folder.logs, folder.temporary)] == [0o700] * 3


def test_a_folder_that_was_open_is_closed(short_path: Path) -> None:
    folder = open_folder(short_path)
    folder.logs.mkdir(mode=0o777)
    folder.logs.chmod(0o777)
    make_folder(folder)
    assert mode(folder.logs) == 0o700


def test_a_path_that_is_too_long_for_a_socket_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the path of the socket /tmp/.* has 126 bytes, and the system allows 89; s"):
        open_folder(Path("/tmp") / ("é" * 50 + "abc"))


def test_a_path_that_supervisord_would_fill_in_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="STACK_DIR /tmp/100%s has a percent sign, which supervisord takes for a variab"
    ):
        open_folder(Path("/tmp/100%s"))


def test_the_longest_path_that_is_allowed_can_be_used(tmp_path: Path) -> None:
    parent = Path("/tmp") / f"test-{os.getpid()}"
    folder = open_folder(parent / ("a" * (MAX_SOCKET_LENGTH - len(str(parent)) - len("//supervisor/socket"))))
    assert len(str(folder.socket)) == MAX_SOCKET_LENGTH
    with socket.socket(socket.AF_UNIX) as server, pytest.raises(FileNotFoundError):
        # What supervisord binds first; the name is not the problem.
        server.bind(f"{folder.socket}.4194304")
    assert len(str(folder.temporary / "pymp-abcdefgh" / "listener-abcdefgh")) == 107
    with pytest.raises(ConfigError):
        open_folder(folder.root.with_name(folder.root.name + "a"))


def test_only_one_starts_or_stops_a_stack_at_a_time(folder: Folder) -> None:
    with (
        start_stop_lock(folder),
        pytest.raises(StackError, match="is being started or stopped; wait"),
        start_stop_lock(folder),
    ):
        pass
    with start_stop_lock(folder):
        pass


# --- Secrets ---


def test_secrets_are_made_once_and_for_their_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        secrets = ensure_secrets(tmp_path / "secrets.json")
    finally:
        os.umask(before)
    assert mode(tmp_path / "secrets.json") == 0o600
    assert ensure_secrets(tmp_path / "secrets.json") == secrets
    assert len(set(values(secrets))) == len(values(secrets))
    assert all(len(value) >= 40 for value in values(secrets))
    assert not [value for value in values(secrets) if value in repr(secrets)]


def test_a_secret_that_is_new_is_added_to_those_that_are_known(tmp_path: Path) -> None:
    path = tmp_path / "secrets.json"
    path.write_text(json.dumps({"webhook_secret": "known"}), encoding="utf-8")
    secrets = ensure_secrets(path)
    assert secrets.webhook_secret == "known"
    assert ensure_secrets(path) == secrets


@pytest.mark.parametrize("auth", ["true", "false"])
def test_a_shell_that_sources_the_file_has_all_variables(folder: Folder, auth: str) -> None:
    stack = set_up(folder, STACK_AUTH=auth)
    folder.env.write_text(env_file(stack), encoding="utf-8")
    command = ["env", "-i", "/bin/sh", "-c", '. "$0" && /usr/bin/env', folder.env]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    exported = dict(line.split("=", 1) for line in printed.splitlines())
    assert exported.items() >= client_environment(stack).items()
    wanted = {
        "PREFECT_API_URL",
        "MLFLOW_TRACKING_URI",
        "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD",
        "AWS_ENDPOINT_URL",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_DEFAULT_REGION",
        "SFGRPO_MIRROR",
        "SFGRPO_DVC_REMOTE",
        "WEBHOOK_SECRET",
    }
    login = {"PREFECT_API_AUTH_STRING", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"}
    assert client_environment(stack).keys() == wanted | (login if auth == "true" else set())


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name != "postgres"])
def test_no_command_line_holds_a_secret(folder: Folder, name: str) -> None:
    stack = set_up(folder, STACK_AUTH="true", STACK_HOST="192.0.2.1")
    launch = PROGRAMS[name].launch(stack)
    assert not [value for value in values(stack.secrets) if value in " ".join(launch.command)]
    assert Path(launch.command[0]).name in ("python", "mlflow", "prefect")
    assert launch.working_directory.exists()
    written = [path for path in folder.data(name).rglob("*") if path.is_file()]
    assert not [path for path in written for value in values(stack.secrets) if value in path.read_text()]


def test_a_server_on_all_addresses_knows_those_of_this_machine() -> None:
    hosts = own_hosts(Settings.model_validate({"STACK_HOST": "0.0.0.0"}), 1234)
    assert {"127.0.0.1:1234", "localhost:1234", f"{socket.gethostname().lower()}:1234"} <= set(hosts)
    assert not [host for host in hosts if "*" in host or host.startswith("0.0.0.0")]


@pytest.mark.parametrize(
    ("variables", "port", "origins"),
    [
        ({}, 4200, ["http://127.0.0.1:4200", "http://localhost:4200"]),
        ({}, 80, ["http://127.0.0.1", "http://localhost"]),
        (
            {"STACK_HOST": "192.0.2.1", "STACK_ORIGINS": "https://prefect.example"},
            4200,
            ["http://127.0.0.1:4200", "http://192.0.2.1:4200", "http://localhost:4200", "https://prefect.example"],
        ),
    ],
)
def test_a_server_answers_to_its_own_addresses(variables: dict[str, str], port: int, origins: list[str]) -> None:
    settings = Settings.model_validate(variables)
    assert own_origins(settings, port) == origins
    assert own_hosts(settings, port) == [origin.split("//")[1] for origin in origins]


@pytest.mark.parametrize("variables", [{}, {"STACK_AUTH": "false"}, {"STACK_HOST": "192.0.2.1"}])
def test_no_setting_opens_prefect_and_mlflow_to_other_pages(folder: Folder, variables: dict[str, str]) -> None:
    stack = set_up(folder, **variables)
    prefect, mlflow = PREFECT.launch(stack), MLFLOW.launch(stack)
    assert prefect.environment["PREFECT_SERVER_CSRF_PROTECTION_ENABLED"] == "true"
    own = ",".join(own_origins(stack.settings, stack.settings.prefect_port))
    assert prefect.environment["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] == own
    assert "*" not in " ".join([own, *mlflow.command])
    assert {"--allowed-hosts", "--cors-allowed-origins"} <= set(mlflow.command)


@pytest.mark.parametrize(("variables", "asks"), [({}, True), ({"STACK_AUTH": "false"}, False)])
def test_prefect_and_mlflow_ask_for_a_login_unless_told_otherwise(
    folder: Folder, variables: dict[str, str], asks: bool
) -> None:
    stack = set_up(folder, **variables)
    prefect, mlflow = PREFECT.launch(stack), MLFLOW.launch(stack)
    assert ("PREFECT_SERVER_API_AUTH_STRING" in prefect.environment) is asks
    assert ("basic-auth" in mlflow.command) is asks


# --- What supervisord reads ---


@pytest.fixture
def options(short_path: Path) -> ServerOptions:
    """What supervisord itself makes of the configuration, in a folder with an awkward name."""
    folder = open_folder(short_path / "a folder")
    make_folder(folder)
    folder.configuration.write_text(configuration(folder, PROGRAMS.values()), encoding="utf-8")
    options = ServerOptions()
    options.realize(["-c", str(folder.configuration)])
    return options


def test_supervisord_restarts_every_program_and_ends_its_whole_group(options: ServerOptions) -> None:
    configs = [group.process_configs[0] for group in options.process_group_configs]
    assert [config.name for config in configs] == list(PROGRAMS)
    for config in configs:
        assert config.stopasgroup and config.killasgroup and config.autorestart and not config.autostart
        assert config.command.split()[-4:] == ["-m", "infra.stack", "run", config.name]
        assert config.stdout_logfile.endswith(f"/a folder/logs/{config.name}.log") and config.redirect_stderr
        assert (config.stdout_logfile_maxbytes, config.stdout_logfile_backups) == (10 * 2**20, 3)
    assert [group.priority for group in options.process_group_configs] == sorted(range(len(PROGRAMS)))


def test_supervisord_listens_on_a_private_socket_alone(options: ServerOptions) -> None:
    (server,) = options.server_configs
    assert (server["family"], server["chmod"]) == (socket.AF_UNIX, 0o700)
    assert server["file"].endswith("/a folder/supervisor/socket")


def test_what_supervisord_reads_holds_no_secret(folder: Folder) -> None:
    stack = set_up(folder, STACK_AUTH="true")
    text = configuration(folder, PROGRAMS.values())
    assert not [value for value in values(stack.secrets) if value in text]


def test_programs_need_only_what_is_started_and_stopped_around_them() -> None:
    names = list(PROGRAMS)
    assert all(names.index(need) < names.index(name) for name, program in PROGRAMS.items() for need in program.needs)


def test_there_is_no_supervisord_where_none_was_started(folder: Folder) -> None:
    assert running_supervisor(folder) is None
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(folder.socket))
    assert running_supervisor(folder) is None


# --- PostgreSQL ---


def install(installed: Path, *versions: str) -> None:
    for version in versions:
        (installed / version / "bin").mkdir(parents=True)
        (installed / version / "bin" / "initdb").touch()


def test_missing_postgres_is_told_with_its_package(tmp_path: Path) -> None:
    (tmp_path / "15" / "bin").mkdir(parents=True)
    with pytest.raises(StackError, match=r"PostgreSQL is not installed, .* by `apt-get install postgresql`"):
        binaries(tmp_path / "cluster", tmp_path)


def test_a_new_cluster_takes_the_newest_postgres_and_an_old_one_its_own(tmp_path: Path) -> None:
    install(tmp_path, "9.6", "15", "17")
    cluster = tmp_path / "cluster"
    assert binaries(cluster, tmp_path) == tmp_path / "17" / "bin"
    cluster.mkdir()
    (cluster / "PG_VERSION").write_text("15\n", encoding="utf-8")
    assert binaries(cluster, tmp_path) == tmp_path / "15" / "bin"


def test_a_cluster_of_a_missing_postgres_names_the_package(tmp_path: Path) -> None:
    install(tmp_path, "15", "17")
    (tmp_path / "PG_VERSION").write_text("16\n", encoding="utf-8")
    with pytest.raises(StackError, match=r"made by PostgreSQL 16, and installed is 15, 17; .* postgresql-16`"):
        binaries(tmp_path, tmp_path)


@pytest.mark.skipif(not IS_ROOT, reason="only root becomes another user")
def test_a_folder_that_the_user_cannot_enter_is_named(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    for parent in (tmp_path, *tmp_path.parents):
        if not parent.stat().st_mode & 0o001:
            parent.chmod(0o711)
    with pytest.raises(ConfigError, match=f"as the user nobody, who cannot enter {closed}; set STACK_DIR to a folder"):
        require_reachable(closed / "a" / "b", "nobody")
    closed.chmod(0o711)
    require_reachable(closed / "a" / "b", "nobody")


# --- Health ---


class Answers(http.server.BaseHTTPRequestHandler):
    """Wants a login, and answers with what it was asked."""

    def do_POST(self) -> None:
        question = self.rfile.read(int(self.headers["Content-Length"]))
        is_known = self.headers["Authorization"] == f"Basic {base64.b64encode(b'me:secret').decode()}"
        self.send_response(200 if is_known or self.path == "/page" else 401)
        self.end_headers()
        self.wfile.write(question if is_known else b"<html>")

    def do_GET(self) -> None:
        self.send_response({"/missing": 404, "/broken": 503}.get(self.path, 200))
        self.end_headers()
        self.wfile.write(b"<html>")

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), Answers) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_an_answer_needs_the_right_credentials(server: str) -> None:
    assert post_json(server, {"a": 1}, ("me", "secret")) == {"a": 1}
    with pytest.raises(UnhealthyError, match="answers with something other than JSON"):
        get_json(server)
    for credentials in (None, ("me", "wrong")):
        with pytest.raises(UnhealthyError, match="answers with status 401"):
            post_json(server, {"a": 1}, credentials)


def test_an_answer_that_is_not_json_is_refused(server: str) -> None:
    with pytest.raises(UnhealthyError, match="answers with something other than JSON"):
        post_json(f"{server}/page", {})


def test_nobody_there_is_told() -> None:
    with pytest.raises(UnhealthyError, match=r"does not answer \(.*refused"):
        post_json(f"http://127.0.0.1:{free_ports(1)[0]}", {})


def test_any_answer_but_a_failure_shows_that_a_server_is_there(server: str) -> None:
    require_answer(server)
    require_answer(f"{server}/missing")
    with pytest.raises(UnhealthyError, match="answers with status 503"):
        require_answer(f"{server}/broken")
    with pytest.raises(UnhealthyError, match=r"does not answer \(.*refused"):
        require_answer(f"http://127.0.0.1:{free_ports(1)[0]}")


def test_the_receiver_of_webhooks_knows_its_secret_and_its_port(folder: Folder) -> None:
    stack = set_up(folder, STACK_WEBHOOK_PORT="12345")
    launch = WEBHOOK.launch(stack)
    assert launch.command[1:] == ["-m", "flows.webhook", "--port", "12345"]
    given = {**prefect_environment(stack), "WEBHOOK_SECRET": stack.secrets.webhook_secret}
    assert launch.environment == {**given, "PREFECT_HOME": str(stack.folder.data("webhook"))}
    held = [value for value in values(stack.secrets) if value in " ".join(launch.environment.values())]
    assert sorted(held) == sorted([stack.secrets.prefect_password, stack.secrets.webhook_secret])


# --- Processes ---


def marked(folder: Folder, program: str) -> subprocess.Popen[bytes]:
    variables = {"SUPERVISOR_SERVER_URL": f"unix://{folder.socket}", "SUPERVISOR_PROCESS_NAME": program}
    # The child becomes the program only when it has something to say.
    process = subprocess.Popen(["sh", "-c", "echo; exec sleep 60"], env=variables, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"\n"
    return process


def test_orphans_are_those_of_the_folder_and_the_program(folder: Folder, short_path: Path) -> None:
    other = open_folder(short_path / "other")
    with marked(folder, "s3") as s3, marked(folder, "mlflow") as mlflow, marked(other, "s3") as foreign:
        try:
            assert {process.pid for process in processes(folder)} == {s3.pid, mlflow.pid}
            assert end_orphans(folder, "s3") == [s3.pid]
            assert end_orphans(folder) == [mlflow.pid]
            assert end_orphans(folder) == []
            assert foreign.poll() is None
        finally:
            for process in (s3, mlflow, foreign):
                process.kill()


def test_a_program_that_still_waits_is_not_the_program(folder: Folder) -> None:
    waiting = subprocess.Popen([sys.executable, "-c", "input()", "-m"], stdin=subprocess.PIPE)
    with waiting:
        assert not is_still_run(waiting.pid)
        waiting.kill()
    assert not psutil.pid_exists(waiting.pid)
    assert is_still_run(waiting.pid)


# --- Commands ---


def test_a_stack_that_was_never_started_has_no_status(
    short_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STACK_DIR", str(short_path))
    assert main(["status"]) == 1
    assert re.search(
        r"error: there is no stack in .*; start one by `make stack`, or set STACK_DIR", capsys.readouterr().err
    )
    assert main(["down"]) == 0
    assert capsys.readouterr().out == f"no stack in {short_path}\n"


def test_a_stack_that_does_not_run_says_so(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STACK_DIR", str(folder.root))
    folder.settings.write_text(dump_settings(Settings()), encoding="utf-8")
    assert main(["status", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [(entry["program"], entry["state"], entry["pid"], entry["health"]) for entry in found] == [
        (name, "STOPPED", None, "it does not run") for name in PROGRAMS
    ]
    assert main(["status"]) == 1
    first, *rows = capsys.readouterr().out.splitlines()
    assert first.split() == ["program", "state", "pid", "uptime", "health", "address"]
    assert [row.split()[:4] for row in rows] == [[name, "STOPPED", "-", "-"] for name in PROGRAMS]


def test_an_unknown_program_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["run", "nothing"])
    assert "invalid choice: 'nothing'" in capsys.readouterr().err
