"""What `infra` describes agrees with the schemas, with its own rules and with the locked packages.

Each check is a function that returns the problems it finds. Every one is also given a planted error.
"""

from __future__ import annotations

import configparser
import importlib.util
import json
import re
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet
from ruamel.yaml import YAML

from infra.prefect_server.serve import own_origins
from infra.stack.programs.mlflow import LOGIN
from infra.supply.lock import MAIN, read_lock
from tests.support.paths import ROOT

INFRA = ROOT / "infra"
TOOLS = ROOT / ".venv-infra" / "bin"
COMPOSE = INFRA / "compose.yaml"
DATABASES = INFRA / "postgres" / "databases.sh"
KUBERNETES = INFRA / "kubernetes"
TRAINING = KUBERNETES / "training.yaml"
TRAINJOB = KUBERNETES / "trainjob.yaml"
DOCKERFILES = sorted((INFRA / "docker").glob("Dockerfile.*"))
BASE = sorted(path for path in (KUBERNETES / "base").glob("*.yaml") if path.name != "kustomization.yaml")
OVERLAYS = ("cpu", "gpu")
TEMPLATES = [KUBERNETES / "overlays" / overlay / "base-job-template.json" for overlay in OVERLAYS]
KUBERNETES_VERSIONS = ("1.31", "1.37")
"""The oldest that the Indexed Job works with, and the newest whose schemas are at hand."""

Document = dict[str, Any]


def strict(required: list[str], **properties: Any) -> Document:
    return {"type": "object", "required": required, "additionalProperties": False, "properties": properties}


NAME = strict(["name"], name={"type": "string", "pattern": "^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$"})
COUNT = {"type": "integer", "minimum": 1}
TRAINER_SPECS = {
    "TrainJob": strict(
        ["runtimeRef"],
        runtimeRef=strict(
            ["name"],
            name={"type": "string"},
            apiGroup={"const": "trainer.kubeflow.org"},
            kind={"enum": ["TrainingRuntime", "ClusterTrainingRuntime"]},
        ),
        trainer=strict([], numNodes=COUNT, image={"type": "string"}),
    ),
    "TrainingRuntime": strict(
        ["template"],
        mlPolicy=strict([], numNodes=COUNT),
        template=strict(
            ["spec"],
            spec=strict(
                ["replicatedJobs"],
                network=strict(
                    [], enableDNSHostnames={"type": "boolean"}, publishNotReadyAddresses={"type": "boolean"}
                ),
                replicatedJobs={
                    "type": "array",
                    "minItems": 1,
                    # The Job inside is checked as one by kubernetes-validate.
                    "items": strict(["name", "template"], name={"type": "string"}, template={"type": "object"}),
                },
            ),
        ),
    ),
}
"""The part of the CRDs of Kubeflow's Trainer 2 that `trainjob.yaml` uses."""


def load(path: Path) -> list[Any]:
    yaml = YAML(typ="safe", pure=True)
    return [document for document in yaml.load_all(path.read_text(encoding="utf-8")) if document]


def run_tool(name: str, *arguments: str | Path) -> str:
    """Run one of the tools; return nothing if it found nothing."""
    program = TOOLS / name
    if not program.exists():
        pytest.fail(f"{program} is missing; run `make infra-tools`")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)
    return (done.stdout + done.stderr).strip() or f"status {done.returncode}" if done.returncode else ""


# --- Images ---


def lint(path: Path) -> str:
    return run_tool("hadolint", path)


def image_rules(path: Path) -> str:
    """Every base has a full version; the last stage has no root, no compilers and says what it is."""
    text = path.read_text(encoding="utf-8")
    problems = [
        f"not pinned: {base}"
        for base in re.findall(r"^FROM (\S+)", text, re.M)
        if not re.search(r":v?\d+\.\d+\.", base)
    ]
    final = text[text.rindex("\nFROM ") if "\nFROM " in text else 0 :]
    users = re.findall(r"^USER (\S+)", final, re.M)
    if not users or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]):
        problems.append("runs as root, or as a user without a number")
    problems += [f"build tool: {tool}" for tool in re.findall(r"build-essential|gcc|g\+\+|-devel\b", final)]
    labels = ("title", "description", "licenses", "version", "revision")
    problems += [f"no label: {label}" for label in labels if f"org.opencontainers.image.{label}=" not in final]
    return "\n".join(problems)


# --- Compose ---


def compose_schema(path: Path) -> str:
    return run_tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", path)


def compose_rules(path: Path) -> str:
    (document,) = load(path)
    problems = [*_service_problems(document), *_open_door_problems(document["services"])]
    if not document["networks"]["backend"].get("internal"):
        problems.append("the network backend is not internal")
    text = "\n".join(
        line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")
    )
    # A single dollar would be filled in by Compose, from the environment of whoever starts it.
    problems += [f"single dollar: {text[m.start() : m.start() + 20]!r}" for m in re.finditer(r"(?<!\$)\$(?!\$)", text)]
    return "\n".join(problems)


def _service_problems(document: Document) -> Iterator[str]:
    services: Document = document["services"]
    awaited = set()
    for name, service in services.items():
        for other, wait in service.get("depends_on", {}).items():
            if wait["condition"] == "service_healthy":
                awaited.add(other)
            elif wait["condition"] != "service_completed_successfully":
                yield f"{name}: waits for {other} to have started, not to answer"
    for name, service in services.items():
        if not re.search(r":v?\d+\.\d+", service["image"]):
            yield f"{name}: image is not pinned: {service['image']}"
        dockerfile = service.get("build", {}).get("dockerfile")
        built = (ROOT / dockerfile).read_text(encoding="utf-8") if dockerfile else ""
        if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", str(service.get("user", ""))) and "\nUSER 10001:10001" not in built:
            yield f"{name}: runs as root"
        has_check = "healthcheck" in service or "\nHEALTHCHECK" in built
        if (name in awaited or "ports" in service) and not has_check:
            yield f"{name}: no health check"
        if service.get("restart", "no") == "no":
            yield f"{name}: is not restarted"
        if service.get("cap_drop") != ["ALL"] or service.get("security_opt") != ["no-new-privileges:true"]:
            yield f"{name}: has more rights than it needs"
        for port in service.get("ports", []):
            if not str(port).startswith("127.0.0.1:"):
                yield f"{name}: port is open to the network: {port}"
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                if not (INFRA / source).exists():
                    yield f"{name}: no such file: {source}"
            elif source not in document["volumes"]:
                yield f"{name}: no such volume: {source}"
        for kind in ("secrets", "networks"):
            for used in service.get(kind, []):
                if used not in document[kind]:
                    yield f"{name}: not among the {kind}: {used}"
        for key, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|TOKEN|ACCESS_KEY", key) and not str(value).startswith("/run/secrets/"):
                yield f"{name}: secret in the environment: {key}"
            if re.search(r"://[^/@]*:[^/@]*@", str(value)):
                yield f"{name}: password in an address: {key}"
        text = json.dumps([service.get("command"), service.get("environment"), service.get("healthcheck")])
        for used in re.findall(r"/run/secrets/([\w.]+)", text):
            if used not in service["secrets"]:
                yield f"{name}: reads a secret that it is not given: {used}"


def _open_door_problems(services: Document) -> Iterator[str]:
    """Prefect and MLflow ask for a login and answer to their own pages alone; the others have only what they need."""
    told = {name: " ".join(map(str, service.get("command", []))) for name, service in services.items()}
    prefect, mlflow, environment = told["prefect-server"], told["mlflow"], services["prefect-server"]["environment"]
    if 'PREFECT_SERVER_API_AUTH_STRING="$$(cat /run/secrets/' not in prefect:
        yield "prefect-server: asks for no login"
    if "serve.py" not in prefect or not any("serve.py" in mount for mount in services["prefect-server"]["volumes"]):
        yield "prefect-server: answers any Host"
    try:
        own_origins(str(environment.get("PREFECT_SERVER_CORS_ALLOWED_ORIGINS", "*")))
    except ValueError as error:
        yield f"prefect-server: answers any Origin: {error}"
    if environment.get("PREFECT_SERVER_CSRF_PROTECTION_ENABLED") != "true":
        yield "prefect-server: takes forged requests"
    if "--app-name basic-auth" not in mlflow or 'MLFLOW_AUTH_ADMIN_PASSWORD="$$(cat /run/secrets/' not in mlflow:
        yield "mlflow: asks for no login"
    mounts = " ".join(services["mlflow"]["volumes"])
    if "/etc/mlflow/login.ini:ro" not in mounts or "/etc/mlflow/sfgrpo_login.py:ro" not in mounts:
        yield "mlflow: takes others' pages for its own"
    for option in ("--allowed-hosts", "--cors-allowed-origins"):
        if not re.search(rf"{option} [^*\s]+(\s|$)", mlflow):
            yield f"mlflow: is open to others: {option}"
    if ". /run/secrets/login" not in told["worker"]:
        yield "worker: has no login"
    if set(services["webhook"]["secrets"]) != {"prefect_login", "webhook_secret"}:
        yield "webhook: has other secrets than it needs"


def shell_syntax(path: Path) -> str:
    return subprocess.run(["sh", "-n", path], capture_output=True, text=True, timeout=60).stderr


def locked_versions(path: Path) -> str:
    """The servers have the versions of the clients that are locked."""
    lock = {package.name: package.version for package in read_lock(ROOT / MAIN)}
    pairs = re.findall(r"[/-](prefect|mlflow):v?(\d+\.\d+\.\d+)", path.read_text(encoding="utf-8"))
    assert pairs, f"{path} names none of them"
    return "\n".join(f"{name} {version}, locked {lock[name]}" for name, version in pairs if lock[name] != version)


# --- Kubernetes ---


def validate(*paths: Path) -> str:
    return "\n".join(
        found
        for version in KUBERNETES_VERSIONS
        if (found := run_tool("kubernetes-validate", "--strict", "--quiet", "-k", version, *paths))
    )


def _validate_documents(documents: list[Document], folder: Path) -> str:
    path = folder / "documents.yaml"
    path.write_text("---\n".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    return validate(path)


def pod_rules(documents: list[Document]) -> str:
    """Each pod keeps to the standard `restricted`, and Jobs have what training needs."""
    problems = []
    for document in documents:
        if document["kind"] not in ("Job", "Deployment"):
            continue
        pod = document["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        wanted = {
            "runs as root": pod.get("securityContext", {}).get("runAsNonRoot"),
            "no seccomp profile": pod.get("securityContext", {}).get("seccompProfile") == {"type": "RuntimeDefault"},
            "may gain privileges": container["securityContext"].get("allowPrivilegeEscalation") is False,
            "has capabilities": container["securityContext"].get("capabilities") == {"drop": ["ALL"]},
            "service links": pod.get("enableServiceLinks") is False,
            "no memory limit": "memory" in container["resources"].get("limits", {}),
            "image is not pinned": re.search(r":\d+\.\d+\.\d+", container["image"]),
            "no component": "app.kubernetes.io/component" in document["spec"]["template"]["metadata"]["labels"],
        }
        if document["kind"] == "Deployment":
            wanted["has no login"] = _logs_in(container["env"])
        if document["kind"] == "Job":
            wanted["has a token"] = pod.get("automountServiceAccountToken") is False
            mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            memory = {
                volume["name"] for volume in pod["volumes"] if volume.get("emptyDir", {}).get("medium") == "Memory"
            }
            wanted["no /dev/shm"] = mounted.get("/dev/shm") in memory
            wanted["no secret"] = any("secretRef" in source for source in container.get("envFrom", []))
            wanted["starts again elsewhere"] = pod["restartPolicy"] == "Never"
        problems += [f"{document['kind']}: {problem}" for problem, is_met in wanted.items() if not is_met]
    return "\n".join(problems)


def _logs_in(variables: list[Document]) -> bool:
    """Return whether a worker takes its login from a secret, and has its Jobs take it from there too."""
    given = {entry["name"]: entry for entry in variables}
    known = given.get("PREFECT_API_AUTH_STRING", {}).get("valueFrom", {}).get("secretKeyRef", {})
    setting = "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET"
    passed_on = [given.get(f"{setting}_{part}", {}).get("value") for part in ("NAME", "KEY")]
    return bool(known) and passed_on == [known["name"], known["key"]]


def training_jobs(path: Path) -> str:
    return validate(path) + pod_rules(load(path))


def base_files(path: Path) -> str:
    return validate(path) + pod_rules(load(path))


def trainer_files(path: Path) -> str:
    """Check Kubeflow's objects, and the Jobs inside by the rules for Jobs."""
    documents = load(path)
    folder = path.parent
    for document in documents:
        kind = document["kind"]
        schema = strict(
            ["apiVersion", "kind", "metadata", "spec"],
            apiVersion={"const": "trainer.kubeflow.org/v1alpha1"},
            kind={"const": kind},
            metadata=NAME,
            spec=TRAINER_SPECS[kind],
        )
        (folder / "schema.json").write_text(json.dumps(schema), encoding="utf-8")
        (folder / "object.json").write_text(json.dumps(document), encoding="utf-8")
        if found := run_tool("check-jsonschema", "--schemafile", folder / "schema.json", folder / "object.json"):
            return found
    runtimes = {item["metadata"]["name"]: item for item in documents if item["kind"] == "TrainingRuntime"}
    references = {item["spec"]["runtimeRef"]["name"] for item in documents if item["kind"] == "TrainJob"}
    if references != runtimes.keys():
        return f"no such runtime: {references}"
    inner = [
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "inner"}, "spec": item["template"]["spec"]}
        for runtime in runtimes.values()
        for item in runtime["spec"]["template"]["spec"]["replicatedJobs"]
    ]
    return _validate_documents(inner, folder) + pod_rules(inner)


def job_template(path: Path) -> str:
    """Fills the template in as Prefect does, with the defaults, and checks the Job that comes out."""
    template = json.loads(path.read_text(encoding="utf-8"))
    variables = template["variables"]["properties"]
    used = set(re.findall(r"{{ (\w+) }}", json.dumps(template["job_configuration"])))
    problems = [f"no such variable: {name}" for name in sorted(used - variables.keys())]
    problems += [f"variable without use: {name}" for name in sorted(variables.keys() - used)]
    values = {name: variable["default"] for name, variable in variables.items() if "default" in variable}
    # What Prefect itself gives.
    values |= {"name": "run", "command": ["prefect"], "labels": {"a": "b"}, "env": [{"name": "A", "value": "b"}]}
    manifest = _filled(template["job_configuration"]["job_manifest"], values)
    spec = manifest["spec"]
    if spec.get("backoffLimit") != 0:
        problems.append("Kubernetes would start a run again, beside Prefect")
    # Prefect insists on these two, in the wrong place; Kubernetes ignores them there.
    pod = spec["template"]["spec"]
    if (pod.pop("parallelism", None), pod.pop("completions", None)) != (1, 1):
        problems.append("Prefect demands parallelism and completions of 1")
    with_gpu = "nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]
    if with_gpu is not ("gpus" in variables):
        problems.append("GPUs without a variable, or a variable without GPUs")
    return "\n".join([*problems, _validate_documents([manifest], path.parent), pod_rules([manifest])]).strip()


def _filled(value: Any, values: Document) -> Any:
    if isinstance(value, dict):
        return {key: _filled(item, values) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, values) for item in value]
    if isinstance(value, str) and (whole := re.fullmatch(r"{{ (\w+) }}", value)):
        return values.get(whole[1])
    return re.sub(r"{{ (\w+) }}", lambda match: str(values.get(match[1])), value) if isinstance(value, str) else value


# --- Everything passes, and every check finds something when there is something ---

Check = Callable[[Path], str]
FILES: list[tuple[Check, Path]] = [
    *((lint, path) for path in DOCKERFILES),
    *((image_rules, path) for path in DOCKERFILES),
    (locked_versions, INFRA / "docker" / "Dockerfile.mlflow"),
    (compose_schema, COMPOSE),
    (compose_rules, COMPOSE),
    (locked_versions, COMPOSE),
    (shell_syntax, DATABASES),
    (training_jobs, TRAINING),
    (trainer_files, TRAINJOB),
    *((base_files, path) for path in BASE),
    (locked_versions, KUBERNETES / "base" / "worker.yaml"),
    *((job_template, path) for path in TEMPLATES),
]
CPU = INFRA / "docker" / "Dockerfile.cpu"
MLFLOW = INFRA / "docker" / "Dockerfile.mlflow"
WORKER = KUBERNETES / "base" / "worker.yaml"
NETWORK = KUBERNETES / "base" / "network.yaml"
ACCOUNTS = KUBERNETES / "base" / "accounts.yaml"
GPU_TEMPLATE = TEMPLATES[1]
PLANTED: list[tuple[Check, Path, str, str, str]] = [
    (lint, CPU, "install --yes", "install", "DL3014"),
    (lint, MLFLOW, "--requirement /tmp/mlflow.lock", "psycopg2-binary", "DL3013"),
    (image_rules, CPU, "FROM python:3.11.15-slim-bookworm\n", "FROM python:latest\n", "not pinned"),
    (image_rules, CPU, "USER 10001:10001", "USER root", "runs as root"),
    (image_rules, CPU, "git tini", "git tini gcc", "build tool: gcc"),
    (image_rules, MLFLOW, "image.revision=", "image.revisoin=", "no label: revision"),
    (locked_versions, MLFLOW, "mlflow:v", "mlflow:v0.", "mlflow 0"),
    (compose_schema, COMPOSE, "healthcheck:", "heathcheck:", "heathcheck"),
    (compose_rules, COMPOSE, "healthcheck:", "x-healthcheck:", "postgres: no health check"),
    (compose_rules, COMPOSE, "SERVER_API_AUTH_STRING=", "API_AUTH_STRING=", "prefect-server: asks for no login"),
    (compose_rules, COMPOSE, "python /opt/sfgrpo/serve.py", "prefect server start", "prefect-server: answers any Host"),
    (compose_rules, COMPOSE, "http://127.0.0.1:4200,", "http://*,", "prefect-server: answers any Origin"),
    (
        compose_rules,
        COMPOSE,
        "SERVER_CORS_ALLOWED_ORIGINS",
        "SERVER_CORS_ORIGINS",
        "prefect-server: answers any Origin",
    ),
    (compose_rules, COMPOSE, 'PROTECTION_ENABLED: "true"', 'PROTECTION_ENABLED: "false"', "takes forged requests"),
    (compose_rules, COMPOSE, "--app-name basic-auth", "", "mlflow: asks for no login"),
    (compose_rules, COMPOSE, "/etc/mlflow/sfgrpo_login.py:ro", "/etc/login.py:ro", "mlflow: takes others' pages"),
    (
        compose_rules,
        COMPOSE,
        "--allowed-hosts mlflow:5000,",
        "--allowed-hosts *,",
        "open to others: --allowed-hosts",
    ),
    (compose_rules, COMPOSE, "--cors-allowed-origins http://localhost:5000,", "", "open to others: --cors-allowed-ori"),
    (compose_rules, COMPOSE, ". /run/secrets/login", "true", "worker: has no login"),
    (
        compose_rules,
        COMPOSE,
        "[prefect_login, webhook_secret]",
        "[prefect_login, s3_admin]",
        "webhook: has",
    ),
    (compose_rules, COMPOSE, "postgres:17.10-bookworm", "postgres:latest", "image is not pinned"),
    (compose_rules, COMPOSE, 'user: "999:999"', 'user: "0:0"', "postgres: runs as root"),
    (compose_rules, COMPOSE, "127.0.0.1:4200:4200", "4200:4200", "open to the network"),
    (compose_rules, COMPOSE, "internal: true", "internal: false", "not internal"),
    (compose_rules, COMPOSE, "secrets: [s3_training,", "secrets: [s3_mlflow,", "not given: s3_training"),
    (compose_rules, COMPOSE, "secrets: [s3_admin]", "secrets: [s3_root]", "not among the secrets: s3_root"),
    (compose_rules, COMPOSE, "/run/secrets/postgres_password", "hunter2", "secret in the environment"),
    (compose_rules, COMPOSE, "prefect@postgres", "prefect:hunter2@postgres", "password in an address"),
    (compose_rules, COMPOSE, "cap_drop: [ALL]", "cap_drop: [CHOWN]", "more rights"),
    (compose_rules, COMPOSE, "restart: unless-stopped", 'restart: "no"', "is not restarted"),
    (compose_rules, COMPOSE, "condition: service_healthy", "condition: service_started", "not to answer"),
    (compose_rules, COMPOSE, "$$(cat /run/secrets/valkey", "$(cat /run/secrets/valkey", "single dollar"),
    (compose_rules, COMPOSE, "- scratch:/work", "- scartch:/work", "no such volume: scartch"),
    (compose_rules, COMPOSE, "./postgres/databases.sh:", "./postgres/database.sh:", "no such file"),
    (locked_versions, COMPOSE, "prefecthq/prefect:3.8.8", "prefecthq/prefect:3.8.7", "prefect 3.8.7"),
    (shell_syntax, DATABASES, "done", "fi", "unexpected"),
    (training_jobs, TRAINING, "backoffLimit:", "backoffLimitt:", "backoffLimitt"),
    (training_jobs, TRAINING, "runAsNonRoot: true", "runAsNonRoot: false", "runs as root"),
    (training_jobs, TRAINING, "medium: Memory", 'medium: ""', "no /dev/shm"),
    (training_jobs, TRAINING, "- secretRef:", "- configMapRef:", "no secret"),
    (trainer_files, TRAINJOB, "runtimeRef:", "runtimeref:", "runtimeref"),
    (
        trainer_files,
        TRAINJOB,
        "    name: training-torch\n  trainer",
        "    name: training\n  trainer",
        "no such runtime",
    ),
    (trainer_files, TRAINJOB, "replicatedJobs:", "replicatedJob:", "replicatedJob"),
    (trainer_files, TRAINJOB, "podFailurePolicy:", "podFailPolicy:", "podFailPolicy"),
    (
        trainer_files,
        TRAINJOB,
        "automountServiceAccountToken: false",
        "automountServiceAccountToken: true",
        "has a token",
    ),
    (base_files, WORKER, "livenessProbe:", "liveProbe:", "liveProbe"),
    (base_files, WORKER, "drop: [ALL]", "drop: [CHOWN]", "has capabilities"),
    (base_files, WORKER, "runAsNonRoot: true", "runAsNonRoot: false", "runs as root"),
    (base_files, WORKER, "name: PREFECT_API_AUTH_STRING", "name: PREFECT_API_KEY", "has no login"),
    (base_files, WORKER, "AUTH_STRING_SECRET_KEY", "AUTH_STRING_KEY", "has no login"),
    (base_files, NETWORK, "podSelector: {}", "podSelecter: {}", "podSelecter"),
    (base_files, ACCOUNTS, "automountServiceAccountToken", "automountToken", "automountToken"),
    (job_template, GPU_TEMPLATE, '"backoffLimit": 0', '"backoffLimit": 6', "beside Prefect"),
    (job_template, GPU_TEMPLATE, '"{{ gpus }}"', '"{{ gpu }}"', "no such variable: gpu"),
    (job_template, GPU_TEMPLATE, '"tolerations"', '"toleration"', "toleration"),
    (job_template, GPU_TEMPLATE, '"parallelism": 1', '"parallelism": 2', "Prefect demands"),
    (job_template, GPU_TEMPLATE, '"nvidia.com/gpu": "{{', '"amd.com/gpu": "{{', "GPUs without a variable"),
]


def _name(value: object) -> str | None:
    return value.name if isinstance(value, Path) else getattr(value, "__name__", None)


@pytest.mark.parametrize(("check", "path"), FILES, ids=_name)
def test_infra_is_as_it_should_be(check: Check, path: Path, tmp_path: Path) -> None:
    assert check(Path(shutil.copy(path, tmp_path))) == ""


@pytest.mark.parametrize(("check", "path", "right", "wrong", "problem"), PLANTED, ids=_name)
def test_a_planted_error_is_found(
    check: Check, path: Path, right: str, wrong: str, problem: str, tmp_path: Path
) -> None:
    text = path.read_text(encoding="utf-8")
    assert right in text, "nothing to plant the error in"
    copy = tmp_path / path.name
    copy.write_text(text.replace(right, wrong), encoding="utf-8")
    assert problem in check(copy)


def test_every_check_has_a_planted_error() -> None:
    assert {check for check, _ in FILES} == {check for check, *_ in PLANTED}


def test_a_missing_tool_names_its_target(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(f"{__name__}.TOOLS", tmp_path)
    with pytest.raises(pytest.fail.Exception, match="hadolint is missing; run `make infra-tools`"):
        lint(CPU)


# --- Kustomize ---


def build(folder: Path) -> list[Document]:
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise ValueError(done.stderr)
    return list(YAML(typ="safe", pure=True).load_all(done.stdout))


needs_kubectl = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kubectl builds the overlays; it is not here"
)


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_builds_into_valid_objects(overlay: str, tmp_path: Path) -> None:
    documents = build(KUBERNETES / "overlays" / overlay)
    assert _validate_documents(documents, tmp_path) == ""
    assert pod_rules(documents) == ""
    assert {item["metadata"].get("namespace", "sfgrpo") for item in documents} == {"sfgrpo"}
    accounts = [item for item in documents if item["kind"] == "ServiceAccount"]
    assert [account["automountServiceAccountToken"] for account in accounts] == [False, False]
    policies = {item["metadata"]["name"]: item["spec"] for item in documents if item["kind"] == "NetworkPolicy"}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    maps = {item["metadata"]["name"]: item["data"] for item in documents if item["kind"] == "ConfigMap"}
    (worker,) = (item["spec"]["template"]["spec"] for item in documents if item["kind"] == "Deployment")
    named = {
        item["valueFrom"]["configMapKeyRef"]["name"] for item in worker["containers"][0]["env"] if "MapKey" in str(item)
    }
    assert [maps[name]["WORK_POOL"] for name in named] == ["sfgrpo"]
    (mounted,) = (volume["configMap"]["name"] for volume in worker["volumes"] if "configMap" in volume)
    assert json.loads(maps[mounted]["base-job-template.json"])["job_configuration"]


@needs_kubectl
def test_a_base_without_its_file_does_not_build(tmp_path: Path) -> None:
    copy = shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    (copy / "base" / "network.yaml").unlink()
    with pytest.raises(ValueError, match=re.escape("network.yaml")):
        build(copy / "overlays" / "cpu")


def test_the_two_pools_differ_in_gpus_and_sizes_alone() -> None:
    cpu, gpu = (json.loads(path.read_text(encoding="utf-8")) for path in TEMPLATES)
    assert gpu["variables"]["properties"].pop("gpus")["minimum"] == 1
    for variables in (cpu["variables"]["properties"], gpu["variables"]["properties"]):
        for name in ("image", "cpu", "memory", "shared_memory", "pod_watch_timeout_seconds"):
            del variables[name]["default"]
    pod = gpu["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    del pod["tolerations"], pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert cpu == gpu


def test_the_two_images_differ_in_torch_alone() -> None:
    cpu, gpu = (
        (INFRA / "docker" / name).read_text(encoding="utf-8").split("\nFROM ")[-1].splitlines()
        for name in ("Dockerfile.cpu", "Dockerfile.cuda")
    )
    differing = [line.strip() for line in set(cpu) ^ set(gpu)]
    assert all(re.match("org.opencontainers.image.description|NVIDIA_|PYTHONUNBUFFERED", line) for line in differing)


def test_links_of_the_page_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", (INFRA / "README.md").read_text(encoding="utf-8"))
    assert targets
    assert not [target for target in targets if not (INFRA / target).exists()]


# --- Secrets ---


def _make_secrets(folder: Path) -> int:
    spec = importlib.util.spec_from_file_location("make_secrets", INFRA / "make_secrets.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    status: int = module.main(folder)
    return status


def test_the_secrets_are_those_that_compose_reads_and_stay_private(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    assert _make_secrets(folder) == 0
    (document,) = load(COMPOSE)
    assert {f"./secrets/{path.name}" for path in folder.iterdir()} == {
        secret["file"] for secret in document["secrets"].values()
    }
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for ignoring in (".gitignore", ".dockerignore"):
        assert re.search("^/?infra/secrets", (ROOT / ignoring).read_text(encoding="utf-8"), re.M), ignoring


def test_the_users_of_s3_have_the_keys_that_the_server_knows(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    _make_secrets(folder)
    for identity in json.loads((folder / "s3_identities.json").read_text(encoding="utf-8"))["identities"]:
        file = configparser.ConfigParser()
        file.read(folder / f"s3_{identity['name']}", encoding="utf-8")
        (known,) = identity["credentials"]
        assert known == {
            "accessKey": file["default"]["aws_access_key_id"],
            "secretKey": file["default"]["aws_secret_access_key"],
        }


def test_one_login_is_the_servers_and_the_clients(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    assert _make_secrets(folder) == 0
    script = (
        '. "$0" && printf "%s|%s:%s" "$PREFECT_API_AUTH_STRING" "$MLFLOW_TRACKING_USERNAME" "$MLFLOW_TRACKING_PASSWORD"'
    )
    told = subprocess.run(["sh", "-c", script, folder / "login"], capture_output=True, text=True, check=True).stdout
    prefect, mlflow = ((folder / name).read_text(encoding="utf-8") for name in ("prefect_login", "mlflow_password"))
    login = configparser.ConfigParser()
    login.read(INFRA / "mlflow" / "login.ini", encoding="utf-8")
    assert told.strip() == f"{prefect}|{login['mlflow']['admin_username']}:{mlflow}"
    assert len(mlflow) >= 40 and len(prefect) >= 40
    Fernet((folder / "mlflow_webhook_key").read_text(encoding="utf-8"))


def test_mlflows_login_is_the_same_in_compose_and_in_the_stack() -> None:
    ours, theirs = configparser.ConfigParser(), configparser.ConfigParser()
    ours.read(INFRA / "mlflow" / "login.ini", encoding="utf-8")
    theirs.read_string(LOGIN.format(database="login.db", user="sfgrpo"))
    assert ours["mlflow"].keys() == theirs["mlflow"].keys()
    assert [key for key in ours["mlflow"] if ours["mlflow"][key] != theirs["mlflow"][key]] == ["database_uri"]
    # The login is an extra of MLflow, which its image lacks.
    assert "flask-wtf" in {package.name for package in read_lock(INFRA / "docker" / "mlflow.lock")}


def test_secrets_are_never_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "secrets"
    assert _make_secrets(folder) == 0
    before = (folder / "postgres_password").read_text(encoding="utf-8")
    assert _make_secrets(folder) == 1
    assert "exists; remove it first" in capsys.readouterr().err
    assert (folder / "postgres_password").read_text(encoding="utf-8") == before
