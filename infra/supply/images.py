"""Pin the images that others build to their digests: a tag can be moved to another image, a digest cannot.

python -m infra.supply.images          0: each has its digest; 1: names those that have a tag only
python -m infra.supply.images --pin    asks their registries, by Docker, and writes the digests into the files
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IMAGE = re.compile(
    r"""^(?P<before>FROM[ ]|[ ]*(?:-[ ])?image:[ ]|[ ]*"default":[ ]")
        (?P<name>[a-z0-9][a-z0-9.:/_-]*/)?(?P<last>[a-z0-9][a-z0-9._-]*):(?P<tag>[\w.-]+)
        (?:@(?P<digest>sha256:[0-9a-f]{64}))?(?P<after>(?:[ ]|"|$))""",
    re.M | re.X,
)
OWN = re.compile(r"sfgrpo(-mlflow)?$")
"""Built from this repository, so that their digests are known only once they are pushed."""


def files(root: Path) -> list[Path]:
    """Return the files that name images."""
    infra = root / "infra"
    kubernetes = (path for path in (infra / "kubernetes").rglob("*") if path.suffix in (".yaml", ".json"))
    return [*sorted((infra / "docker").glob("Dockerfile.*")), infra / "compose.yaml", *sorted(kubernetes)]


def images(text: str) -> Iterator[tuple[str, str | None]]:
    """Yield the images of a file that others build: name with tag, and digest."""
    for found in IMAGE.finditer(text):
        if not OWN.match(found["last"]):
            yield _tagged(found), found["digest"]


def pin(root: Path) -> None:
    """Write the digest that each tag has now; the same one wherever the image is named."""
    texts = {path: path.read_text(encoding="utf-8") for path in files(root)}
    digests = {
        image: look_up(image) for image in sorted({image for text in texts.values() for image, _ in images(text)})
    }

    def pinned(found: re.Match[str]) -> str:
        digest = digests.get(_tagged(found))
        return f"{found['before']}{_tagged(found)}@{digest}{found['after']}" if digest else found[0]

    for path, text in texts.items():
        path.write_text(IMAGE.sub(pinned, text), encoding="utf-8")
    print("\n".join(f"{image}@{digest}" for image, digest in digests.items()))


def look_up(image: str) -> str:
    """Return the digest of an image's index, which covers all its platforms, at its registry."""
    command = ["docker", "buildx", "imagetools", "inspect", "--format", "{{json .Manifest}}", image]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise SystemExit("docker is not installed; pin the images where it is.") from None
    if done.returncode:
        raise SystemExit(f"The digest of {image} cannot be looked up: {done.stderr.strip()}")
    digest = json.loads(done.stdout)["digest"]
    if not re.fullmatch("sha256:[0-9a-f]{64}", digest):
        raise SystemExit(f"{digest!r} is no digest of {image}.")
    return str(digest)


def main(arguments: list[str]) -> int:
    """Pin the images, or name those that are not pinned."""
    if arguments == ["--pin"]:
        pin(ROOT)
        return 0
    bare = sorted({image for path in files(ROOT) for image, digest in images(path.read_text("utf-8")) if not digest})
    for image in bare:
        print(f"{image} has a tag only; `make images` writes its digest.")
    return 1 if bare else 0


def _tagged(found: re.Match[str]) -> str:
    return f"{found['name'] or ''}{found['last']}:{found['tag']}"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
