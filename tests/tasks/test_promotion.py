"""What a decision shows in Prefect."""

from __future__ import annotations

from typing import Any

import pytest

from tasks import promotion


@pytest.mark.parametrize(
    ("uri", "link"),
    [
        ("http://me:S3cr/et@x@mlflow:5000/?token=abc", "http://mlflow:5000/#/models/shapes/versions/7"),
        ("https://mlflow/base/", "https://mlflow/base/#/models/shapes/versions/7"),
        ("postgresql://me:S3cret@db:5432/mlflow", None),
        ("sqlite:///mlflow.db", None),
    ],
)
def test_link_to_the_version_has_no_credentials(monkeypatch, uri, link):
    shown: list[Any] = []
    monkeypatch.setattr(
        promotion,
        "read_environment",
        lambda: type("Environment", (), {"tracking_uri": uri}),  # no other field is read
    )
    monkeypatch.setattr(promotion, "create_markdown_artifact", lambda *arguments, **options: None)
    monkeypatch.setattr(promotion, "create_link_artifact", lambda address, **options: shown.append((address, options)))
    promotion.show_decision({"report": "**Promoted.**", "model": "shapes", "version": 7})
    assert [address for address, _ in shown] == ([] if link is None else [link])
    assert "S3cr" not in repr(shown)
