"""Draw with registered versions as `python -m sfgrpo sample` does, without its process."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from sfgrpo.registry import drawing
from sfgrpo.registry.package import verified_copy
from sfgrpo.registry.register import connect_globally
from sfgrpo.registry.versions import find_version


def draw(uri: str, address: str, prompts: list[str], **params: Any) -> list[bytes]:
    """Return a PNG file for each prompt, drawn from a verified copy."""
    version = find_version(connect_globally(uri), address)
    with tempfile.TemporaryDirectory() as scratch, verified_copy(version, Path(scratch)) as package:
        return drawing.draw(package, prompts, **params)
