"""Resolve each .in file into a lock: exact versions, and the hash of every file that an index has of them.

python -m infra.supply.lock              keeps the versions that are locked as far as the .in files admit them
python -m infra.supply.lock --upgrade    takes the newest that they admit
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPLY = Path("infra/supply")
MAIN = Path("requirements.lock")
TORCH = SUPPLY / "torch.lock"
TORCH_CPU = SUPPLY / "torch-cpu.lock"

LOCKS = {
    MAIN: Path("requirements.in"),
    SUPPLY / "build.lock": SUPPLY / "build.in",
    SUPPLY / "tools.lock": SUPPLY / "tools.in",
    Path("infra/requirements.lock"): Path("infra/requirements.in"),
    Path("infra/s3_server/requirements.lock"): Path("infra/s3_server/requirements.in"),
    Path("infra/docker/mlflow.lock"): Path("infra/docker/mlflow.in"),
}
"""The file that each lock resolves. `requirements.in` yields a second one, `TORCH`."""

OF_TORCH = re.compile(r"torch$|(nvidia|cuda)-|triton$")
"""Names of PyPI's torch, and of what that needs on Linux and the build for CPUs does not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """One package of a lock: its name, and its lines as they are in the file."""

    name: str
    version: str
    text: str

    @property
    def hashes(self) -> list[str]:
        return re.findall(r"--hash=sha256:([0-9a-f]{64})", self.text)


def read_lock(path: Path) -> list[Package]:
    """Return the packages of a lock, in the order of the file."""
    blocks = re.findall(r"^[A-Za-z0-9].*(?:\n[ ].*)*", path.read_text(encoding="utf-8"), re.M)
    return [_package(block) for block in blocks]


def main(arguments: list[str]) -> int:
    """Write every lock anew."""
    if unknown := set(arguments) - {"--upgrade"}:
        print(f"{sorted(unknown)} is no option; --upgrade is the only one.", file=sys.stderr)
        return 2
    for lock, source in LOCKS.items():
        # All but the first agree with it where they have packages in common.
        constraints = [] if lock == MAIN else ["--constraint", str(MAIN)]
        packages = _resolve(source, kept=[lock, TORCH] if lock == MAIN else [lock], options=[*arguments, *constraints])
        if lock == MAIN:
            torch = [package for package in packages if OF_TORCH.match(package.name)]
            _check_cpu_build(next(package for package in torch if package.name == "torch"))
            _write(TORCH, source, torch)
            packages = [package for package in packages if package not in torch]
        _write(lock, source, packages)
        print(f"{lock}: {len(packages)} packages")
    return 0


def _resolve(source: Path, *, kept: list[Path], options: list[str]) -> list[Package]:
    """Return what `source` needs on any platform; versions that the locks `kept` have are preferred."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "resolved"
        output.write_text("".join((ROOT / path).read_text("utf-8") for path in kept if (ROOT / path).exists()), "utf-8")
        subprocess.run(
            [
                Path(sys.executable).with_name("uv"), "pip", "compile", "--quiet", "--universal", "--generate-hashes",
                "--python-version", "3.11", "--no-header", "--no-annotate", "--no-config",
                "--default-index", "https://pypi.org/simple", "--output-file", output, *options, source,
            ],
            cwd=ROOT,
            check=True,
        )  # fmt: skip
        return read_lock(output)


def _package(block: str) -> Package:
    found = re.match(r"([\w.-]+)==([^\s;\\]+)", block)
    if not found:
        raise SystemExit(f"{block.splitlines()[0]!r} names no exact version; every line of a lock is NAME==VERSION.")
    return Package(name=found[1], version=found[2], text=block)


def _check_cpu_build(torch: Package) -> None:
    """Raise unless the lock that is kept by hand has the same version."""
    (build,) = read_lock(ROOT / TORCH_CPU)
    if build.version != f"{torch.version}+cpu":
        raise SystemExit(
            f"{TORCH_CPU} has torch {build.version}, and {TORCH} now has {torch.version}; "
            f"write {torch.version}+cpu there, with the hashes at https://download.pytorch.org/whl/cpu/torch/."
        )


def _write(lock: Path, source: Path, packages: list[Package]) -> None:
    header = f"# Made from {source} by `make lock`; each package with the SHA-256 of all its files.\n"
    (ROOT / lock).write_text(header + "".join(package.text + "\n" for package in packages), encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
