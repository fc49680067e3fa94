"""Tracker that keeps its records in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfgrpo.runtime.manifest import sha256_of_file
from sfgrpo.tracking.base import PromptUse, RunStatus, Tracker, param_texts


class RecordingTracker(Tracker):
    """Keeps every record in public lists and dicts."""

    def __init__(self) -> None:
        self.params: dict[str, str] = {}
        self.metrics: dict[str, list[tuple[int, float]]] = {}
        self.images: list[tuple[str, int, Path]] = []
        self.texts: dict[str, str] = {}
        self.prompts: list[tuple[str, str, str]] = []
        self.tags: dict[str, str] = {}
        self.status: RunStatus | None = None

    @property
    def run_id(self) -> str:
        return "recorded"

    def open(self) -> None:
        pass

    def log_params(self, params: Mapping[str, Any]) -> None:
        self.params |= param_texts(params)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        for key, value in metrics.items():
            self.metrics.setdefault(key, []).append((step, float(value)))

    def log_image(self, path: Path, key: str, step: int) -> None:
        self.images.append((key, step, path))

    def log_text(self, text: str, name: str) -> None:
        self.texts[name] = text

    def log_prompts(self, path: Path, name: str, context: PromptUse) -> None:
        self.prompts.append((name, context, sha256_of_file(path)))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self.tags |= tags

    def finish(self, status: RunStatus) -> None:
        self.status = status
