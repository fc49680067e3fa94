"""What a version may hold, whatever its manifest says: data, and the serving code that this project has shipped."""

from __future__ import annotations

import ast
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from sfgrpo.config.schema import RegistryConfig
from sfgrpo.errors import RegistryError
from sfgrpo.registry.contents import SERVING, SHIPPED_SERVING, ForeignContentError, read_model_file
from sfgrpo.registry.package import Package, require_its_adapter, verified_package
from sfgrpo.registry.register import SERVING_FILE, TrainedAdapter, register_version
from sfgrpo.registry.versions import Version
from sfgrpo.runtime.manifest import sha256_of_file, write_manifest
from tests.support.paths import ROOT
from tests.support.tiny import build_tiny_adapter, build_tiny_pipeline, tiny_serving

# From libraries, not from us: SQLAlchemy's, MLflow's and diffusers' own deprecations and advice.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*Any type hint is inferred:UserWarning"
)

Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("contents")
    build_tiny_adapter(build_tiny_pipeline(folder / "pipeline"), folder / "adapter")
    return folder


def register(store: Path, pipeline: Path) -> None:
    register_version(
        uri=f"sqlite:///{store / 'mlflow.db'}",
        experiment="tests",
        registry=RegistryConfig(model_name="contents", alias="challenger"),
        adapter=TrainedAdapter(folder=store / "adapter", metrics={}, provenance={"git_commit": "c0ffee"}, run_id=None),
        serving=tiny_serving(pipeline),
        scratch=store / ".scratch",
    )


@pytest.fixture(scope="module")
def registered(store: Path) -> Path:
    register(store, store / "pipeline")
    (model_file,) = (store / "mlartifacts").rglob("MLmodel")
    return model_file.parent


@pytest.fixture
def version(registered: Path, tmp_path: Path) -> Path:
    """A copy of a version, which the test may change."""
    return Path(shutil.copytree(registered, tmp_path / "version"))


def verify(folder: Path) -> Package:
    """Verify a version whose manifest and tag were replaced together with its files."""
    manifest = write_manifest(folder)
    return verified_package(Version(model="m", number=1, tags={}), folder, sha256_of_file(manifest))


def write(name: str, content: str | bytes = "") -> Change:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def in_model_file(**values: Any) -> Change:
    """Set values in the flavor of MLmodel; those of `config__x` in its `config`."""

    def change(folder: Path) -> None:
        yaml = YAML()
        content = yaml.load(folder / "MLmodel")
        flavor = content["flavors"]["python_function"]
        for name, value in values.items():
            place, key = (flavor["config"], name[8:]) if name.startswith("config__") else (flavor, name)
            place[key] = value
        yaml.dump(content, folder / "MLmodel")

    return change


def another_flavor(folder: Path) -> None:
    yaml = YAML()
    content = yaml.load(folder / "MLmodel")
    content["flavors"]["sklearn"] = {"pickled_model": "model.json"}
    yaml.dump(content, folder / "MLmodel")


def in_json(name: str, key: str, value: Any) -> Change:
    def change(folder: Path) -> None:
        (path,) = folder.rglob(name)
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    return change


def link(name: str, target: str) -> Change:
    return lambda folder: os.symlink(target, folder / name)


def artifacts(**paths: str) -> Change:
    entries = {"adapter": "artifacts/adapter", "pipeline": "artifacts/pipeline"} | paths
    return in_model_file(artifacts={name: {"path": path, "uri": "x"} for name, path in entries.items()})


def without_pipeline(pretrained: str) -> Change:
    return in_model_file(
        artifacts={"adapter": {"path": "artifacts/adapter", "uri": "x"}}, config__pretrained=pretrained
    )


FOREIGN: dict[str, tuple[Change, str]] = {
    "other serving code": (write(SERVING, "import os\n"), "serving.py is code that this project has never shipped"),
    "serving code with a comment more": (
        lambda folder: (folder / SERVING).write_text(SERVING_FILE.read_text() + "# x\n"),
        "serving.py is code that this project has never shipped",
    ),
    "code beside the serving code": (write("torch.py", "import os\n"), "holds torch.py"),
    "code in a subfolder": (write("artifacts/adapter/serving.py", "import os\n"), "holds artifacts/adapter/serving.py"),
    "compiled code": (write("serving.pyc", b"\0"), "holds serving.pyc"),
    "native code": (write("code/torch.so", b"\x7fELF"), "holds code/torch.so"),
    "path file": (write("x.pth", "import os\n"), "holds x.pth"),
    "pickle": (write("python_model.pkl", b"\x80\x04N."), "holds python_model.pkl"),
    "archive": (write("more.zip", b"PK\x03\x04"), "holds more.zip"),
    "file without an ending": (write("run", "#!/bin/sh\n"), "holds run; a version may hold"),
    "link": (link("more.json", "/etc/passwd"), "more.json is a link or no regular file"),
    "link to a folder": (link("more", "/etc"), "more is a link or no regular file"),
    "link without a target": (link("more.json", "nowhere"), "more.json is a link"),
    "pipe": (lambda folder: os.mkfifo(folder / "more.json"), "more.json is a link or no regular file"),
    "other loader": (in_model_file(loader_module="os"), "has loader_module 'os' instead of 'mlflow.pyfunc.loaders"),
    "pickling loader": (in_model_file(loader_module="mlflow.pyfunc.model"), "has loader_module 'mlflow.pyfunc.model'"),
    "no loader": (in_model_file(loader_module=None), "has loader_module None"),
    "other code": (in_model_file(model_code_path="artifacts/adapter/x.py"), "has model_code_path 'x.py' instead of"),
    "no code": (in_model_file(model_code_path=None), "has model_code_path 'None' instead of 'serving.py'"),
    "code paths": (in_model_file(code="."), "has code '.' instead of None"),
    "python model": (in_model_file(python_model="python_model.json"), "has python_model, by which other code"),
    "data elsewhere": (in_model_file(data="/tmp"), "has data, by which other code"),
    "other flavor": (another_flavor, "has the flavors python_function, sklearn instead of"),
    "no MLmodel": (lambda folder: (folder / "MLmodel").unlink(), "MLmodel describes no python_function"),
    "no mapping": (write("MLmodel", "[]"), "MLmodel describes no python_function"),
    "tagged YAML": (write("MLmodel", "flavors: !!python/object/apply:os.system [x]"), "MLmodel describes no"),
    "adapter elsewhere": (artifacts(adapter="/etc"), "takes files from /etc, which is not below artifacts"),
    "adapter above": (artifacts(adapter="artifacts/../../x"), r"takes files from artifacts/../../x"),
    "pipeline that is absent": (artifacts(pipeline="artifacts/none"), "names artifacts/none, which does not exist"),
    "further artifact": (artifacts(more="artifacts/adapter"), "has artifacts .* instead of adapter and pipeline"),
    "no adapter": (in_model_file(artifacts={}), "has artifacts {} instead of adapter and pipeline"),
    "other weights": (in_model_file(config__adapter_file="../../x"), r"has adapter_file '../../x', not"),
    "other attribute of torch": (in_model_file(config__dtype="load"), "has dtype 'load', which is none of"),
    "base model of the machine": (without_pipeline("/tmp/base"), "takes the base model from '/tmp/base', which is no"),
    "base model above": (without_pipeline("../base"), r"takes the base model from '../base', which is no name"),
    "remote code": (in_json("model_index.json", "vae", ["my_vae", "Vae"]), r"takes vae from \['my_vae', 'Vae'\]"),
    "remote pipeline": (in_json("model_index.json", "_class_name", ["p", "P"]), r"takes _class_name from \['p', 'P'\]"),
    "automatic code": (
        in_json("vae/config.json", "auto_map", {"AutoModel": "x--y.Z"}),
        "artifacts/pipeline/vae/config.json has auto_map, by which other code would be loaded",
    ),
    "kernel of the hub": (
        in_json("text_encoder/config.json", "attn_implementation", "someone/kernel"),
        "text_encoder/config.json has attn_implementation",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_code_and_other_foreign_content_is_refused(version, case):
    change, complaint = FOREIGN[case]
    (version / "MLmodel").chmod(0o600)
    change(version)
    with pytest.raises(ForeignContentError, match=complaint) as refusal:
        read_model_file(version)
    assert "\n" not in str(refusal.value)


def test_foreign_code_is_refused_though_manifest_and_tag_are_of_it(version):
    write(SERVING, "import os\n")(version)
    with pytest.raises(RegistryError, match=r"^nothing is loaded from models:/m/1: serving.py is code that"):
        verify(version)


@pytest.mark.parametrize("place", ["tag", "MLmodel", "neither, for it is gone"])
def test_version_that_holds_another_adapter_than_it_says_is_refused(version, place):
    tags = {"adapter_sha256": "0" * 64} if place == "tag" else {}
    if place == "MLmodel":
        in_model_file(config__adapter_sha256="1" * 64)(version)
    elif place != "tag":
        (version / "artifacts/adapter/pytorch_lora_weights.safetensors").unlink()
    found, manifest = Version(model="m", number=1, tags=tags), write_manifest(version)
    with pytest.raises(RegistryError, match=r"models:/m/1 holds another adapter than its (tag adapter_sha256|MLmodel)"):
        require_its_adapter(verified_package(found, version, sha256_of_file(manifest)))


def test_version_as_it_is_registered_is_accepted(version):
    package = verify(version)
    assert package.adapter == version / "artifacts/adapter"
    assert package.pretrained == str(version / "artifacts/pipeline")


@pytest.mark.parametrize("name", ["stabilityai/stable-diffusion-3.5-medium", "gpt2"])
def test_base_model_may_be_one_of_the_hub(version, name):
    without_pipeline(name)(version)
    assert verify(version).pretrained == name


def test_serving_code_of_today_is_among_the_shipped():
    assert sha256_of_file(SERVING_FILE) in SHIPPED_SERVING, "add the new digest to SHIPPED_SERVING, and remove none"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (write("pipeline/vae/diffusion_pytorch_model.bin", b"\x80\x04N."), "holds .*/vae/diffusion_pytorch_model.bin"),
        (write("pipeline/pipeline.py", "import os\n"), "holds .*pipeline.py"),
        (lambda folder: in_json("model_index.json", "vae", ["x", "Y"])(folder / "pipeline"), "takes vae from"),
    ],
)
def test_base_model_that_no_version_may_hold_is_refused_before_anything_is_registered(
    store, tmp_path, change, complaint
):
    from sfgrpo.tracking.mlflow_client import connect

    shutil.copytree(store / "pipeline", tmp_path / "pipeline")
    shutil.copytree(store / "adapter", tmp_path / "adapter")
    change(tmp_path)
    with pytest.raises(RegistryError, match=f"policy.pretrained: .* cannot be registered: .*{complaint}.*remove it"):
        register(tmp_path, tmp_path / "pipeline")
    assert not connect(f"sqlite:///{tmp_path / 'mlflow.db'}").search_registered_models()


MODULES = sorted(path for folder in ("sfgrpo", "tasks", "flows") for path in (ROOT / folder).rglob("*.py"))
ONLY_IN = {
    "load_model": "sfgrpo/registry/drawing.py",
    "download_artifacts": "sfgrpo/registry/package.py",
    "Package": "sfgrpo/registry/package.py",
}
"""Names with the only module that may use them, so that everything that is loaded was verified."""
LOADING = ("spec_from_file_location", "exec_module", "runpy", "_load_pyfunc", "load_pyfunc", "spark_udf")


def used_names(path: Path) -> set[str]:
    """Return what a module calls, and what it imports from elsewhere under any name."""
    used: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            used.add(ast.unparse(node.func).rpartition(".")[2])
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            used |= {alias.name for alias in node.names if not module.startswith("sfgrpo")} | {module}
    return used


def test_one_module_alone_loads_models_and_one_alone_copies_them():
    users = {name: [] for name in ONLY_IN}
    for path in MODULES:
        used = used_names(path)
        for name in ONLY_IN.keys() & used:
            users[name].append(path.relative_to(ROOT).as_posix())
        assert not used & set(LOADING), path
    assert users == {name: [module] for name, module in ONLY_IN.items()}
