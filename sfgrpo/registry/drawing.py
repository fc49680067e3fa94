"""Draw images with registered versions; the only module that runs the code of a version."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfgrpo.errors import ConfigError, RegistryError
from sfgrpo.registry.package import Package, require_its_adapter, verified_copy
from sfgrpo.registry.versions import Version

if TYPE_CHECKING:
    import pandas as pd

SMOKE_PROMPT = "a photo of a circle"
REFUSED = "INVALID_PARAMETER_VALUE"
"""MLflow's code for a request that its sender has to change."""
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def draw(package: Package, prompts: Sequence[str], **params: Any) -> list[bytes]:
    """Load a verified version, as any user of the registry would load it, and draw a PNG file per prompt.

    Raises:
        ConfigError: The version's limits refuse prompts or parameters; most of that is found before it is loaded.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.pyfunc import load_model

    from sfgrpo.registry.serving import check_request

    try:
        check_request(prompts, params, package.settings)
        images: pd.DataFrame = load_model(str(package.folder)).predict(list(prompts), params=params)
    except MlflowException as error:
        if error.error_code != REFUSED:
            raise
        raise ConfigError(f"{package.version.address}: {error.message}") from error
    return list(images["png"])


def smoke_test(version: Version, scratch: Path) -> None:
    """Raise `RegistryError` unless a version is what was registered and draws an image.

    READY versions of MLflow may lack their files.
    """
    with verified_copy(version, scratch) as package:
        require_its_adapter(package)
        try:
            (image,) = draw(package, [SMOKE_PROMPT], num_inference_steps=2)
        except Exception as error:
            raise RegistryError(
                f"{version.address} is registered but cannot draw ({error}); delete the version, then register again"
            ) from error
    if not image.startswith(PNG_SIGNATURE):
        raise RegistryError(f"{version.address} returned {image[:8]!r} instead of a PNG file")
