"""The page of metrics, `docs/metrics.md`."""

from __future__ import annotations

import re

from tests.support.paths import ROOT

METRICS = ROOT / "docs/metrics.md"


def documented() -> list[str]:
    """Return the metric keys of the page."""
    return re.findall(r"^\| `([^`]+)` \|", METRICS.read_text(encoding="utf-8"), flags=re.MULTILINE)
