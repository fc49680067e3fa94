"""Secrets are blotted out of texts, in every place and form, and nothing else is."""

from __future__ import annotations

import base64
import json
import logging
import os
import random
import secrets
import string
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest

from sfgrpo.errors import ConfigError
from sfgrpo.runtime.environment import read_environment
from sfgrpo.runtime.redaction import SecretFreeFormatter, without_credentials, without_secrets
from tests.support.paths import ROOT
from tests.support.secrets_search import in_bytes

HEX, BASE64 = string.hexdigits.lower()[:16], string.ascii_letters + string.digits + "+/"


@pytest.fixture(autouse=True)
def no_secrets_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in list(os.environ):
        if name.upper().endswith(("TOKEN", "SECRET", "PASSWORD", "KEY", "CREDENTIALS", "STRING", "URI", "URL")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return


def made_up(alphabet: str, length: int, seed: int) -> str:
    return "".join(random.Random(seed).choices(alphabet, k=length))


TOKEN = made_up(string.ascii_letters + string.digits, 36, 1)
AWS_KEY = made_up(BASE64, 40, 2)
LOOKS: dict[str, tuple[str, str]] = {
    "user and password": ("to http://me:S3cret!x@host:5000/x", "S3cret!x"),
    "password with a slash": ("postgresql://me:a/b/S3cretx@db:5432/mlflow", "S3cretx"),
    "password with an at sign": ("mysql+pymysql://me:a@S3cretx@db/mlflow?ssl=1", "S3cretx"),
    "password with both": ("('http://me:a/@b@/S3cretx@host/x')", "S3cretx"),
    "password with a hash": ("http://me:S3cr#et?x@host", "S3cr"),
    "token in place of a user": (f"https://{TOKEN}@github.com/a/b.git", TOKEN),
    "quoted password": ("http://me:S3%2Fcr%40et@host", "S3%2Fcr%40et"),
    "sqlite with a query": ("sqlite:////data/x.db?key=1&password=S3cretx", "S3cretx"),
    "postgres with a query": ("postgresql://db/x?user=me&password=S3cretx&sslmode=require", "S3cretx"),
    "presigned, version 4": (
        f"https://b.s3.amazonaws.com/k?X-Amz-Credential=AKIAIOSFODNN7EXAMPLE%2Fx&X-Amz-Signature={'ab' * 32}&x=1",
        "ab" * 32,
    ),
    "presigned, session": (f"GET /k?X-Amz-Security-Token={urllib.parse.quote_plus(AWS_KEY)} HTTP", AWS_KEY[:12]),
    "presigned, version 2": (
        f"http://b/k?AWSAccessKeyId=AKIAIOSFODNN7EXAMPLE&Signature={TOKEN}%3D&Expires=1",
        TOKEN,
    ),
    "presigned, Azure": (f"https://a.blob.core.windows.net/k?sv=2022&sig={TOKEN}%3D", TOKEN),
    "presigned, Google": (f"https://storage.googleapis.com/b/k?X-Goog-Signature={TOKEN}", TOKEN),
    "presigned, CloudFront": (f"https://d.cloudfront.net/k?Policy={TOKEN}&Key-Pair-Id=K2J", TOKEN),
    "token of a query": (f"http://host/x?a=1&access_token={TOKEN}#y", TOKEN),
    "in HTML": (f'<a href="http://host/x?a=1&amp;token={TOKEN}">', TOKEN),
    "header": (f"Authorization: Bearer {TOKEN}\nHost: x", TOKEN),
    "basic header": ("authorization: Basic dXNlcjpTM2NyZXR4", "dXNlcjpTM2NyZXR4"),
    "header in Python": (f"{{'Authorization': 'Bearer {TOKEN}', 'Host': 'x'}}", TOKEN),
    "header in Python, as bytes": (f"{{b'Authorization': b'token {TOKEN}'}}", TOKEN),
    "header in JSON": (json.dumps({"authorization": f"Basic {TOKEN}"}), TOKEN),
    "header of AWS": (
        f"Authorization: AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/x, SignedHeaders=host, Signature={TOKEN}",
        TOKEN,
    ),
    "header of a proxy": (f"Proxy-Authorization: Basic {TOKEN}", TOKEN),
    "scheme alone": (f"sent Bearer {TOKEN} to host", TOKEN),
    "cookie": (f"Cookie: session={TOKEN}; other=1", TOKEN),
    "cookie that is set": (f"Set-Cookie: id={TOKEN}; Path=/", TOKEN),
    "key of an interface": (f"x-api-key: {TOKEN}", TOKEN),
    "JSON": ('{"user": "me", "password": "S3cretx"}', "S3cretx"),
    "JSON with a quote": ('{"password": "S3\\"cretx", "a": 1}', "cretx"),
    "JSON of AWS": (f'{{"SecretAccessKey": "{AWS_KEY}", "SessionToken": "{TOKEN}"}}', AWS_KEY),
    "Python": ("Config(user='me', password='S3 cretx')", "cretx"),
    "INI": (f"aws_secret_access_key = {AWS_KEY}", AWS_KEY),
    "environment": ("MLFLOW_TRACKING_PASSWORD=S3cretx", "S3cretx"),
    "YAML": ("user: me\n  client_secret: S3cretx\n", "S3cretx"),
    "option": ("run --db-password S3cretx --x", "S3cretx"),
    "id of AWS": ("key AKIAIOSFODNN7EXAMPLE is unknown", "AKIAIOSFODNN7EXAMPLE"),
    "Hugging Face": (f"hf_{TOKEN[:34]} is invalid", f"hf_{TOKEN[:34]}"),
    "GitHub": (f"(ghp_{TOKEN})", f"ghp_{TOKEN}"),
    "GitHub, fine": (f"github_pat_{TOKEN}_{TOKEN}", TOKEN),
    "GitLab": (f"glpat-{TOKEN[:20]}", TOKEN[:20]),
    "Slack": (f"xoxb-123456789012-{TOKEN}", TOKEN),
    "Slack hook": (f"https://hooks.slack.com/services/T0/B0/{TOKEN}", TOKEN),
    "Prefect": (f"'pnu_{TOKEN}'", TOKEN),
    "web token": (f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.{TOKEN}", TOKEN),
    "private key": (f"-----BEGIN RSA PRIVATE KEY-----\n{AWS_KEY}\n-----END RSA PRIVATE KEY-----\nx", AWS_KEY),
}
"""Texts with a secret that nobody told this process of."""


@pytest.mark.parametrize("case", LOOKS)
def test_what_looks_like_a_secret_is_blotted_out(case):
    text, secret = LOOKS[case]
    redacted = without_secrets(text)
    assert secret not in redacted and "***" in redacted
    assert without_secrets(redacted) == redacted


HARMLESS = [
    "a" * 64,
    made_up(HEX, 64, 3),
    f"sha256 {made_up(HEX, 64, 4)} of 5720 bytes",
    f"run train-{made_up(HEX, 16, 5)} is new, key {made_up(HEX, 64, 6)}",
    f"commit {made_up(HEX, 40, 7)} of branch runs/calm-owl",
    made_up(BASE64, 64, 8),
    "sfgrpo.key of MLflow run 3a",
    "models:/sfgrpo-shapes@champion does not exist",
    "http://127.0.0.1:5000/#/models/sfgrpo-shapes/versions/3",
    "http://host:5000/a@b and https://registry.npmjs.org/@scope/pkg",
    "git+https://github.com/a/b@v1.2",
    "s3://bucket/prefix/train-0123456789abcdef/checkpoints",
    "sqlite:////home/me@work/mlflow.db",
    "/home/a@b.c/models/shapes-base/tokenizer/tokenizer.json",
    "mail to me@example.org",
    "prompt 0 has 22 tokens and the text encoder takes 12",
    "max_sequence_length=77, tokens=12, max_tokens=4096, token=12",
    "Basic authentication failed, a bearer of news, basic arithmetic",
    "MLFLOW_TRACKING_PASSWORD is not set; set the password",
    "password: wrong",
    "password=None, token=False",
    "reward/mean 0.123 best/geneval/overall=0.5 optim/grad_norm=1e-05",
    "policy.pretrained: stabilityai/stable-diffusion-3.5-medium",
    "the secret of success: work",
    "task-key, asked, sk-learn, hf_hub, ghp_x",
    "SFGRPO_MIRROR=s3://bucket/runs",
    "eyJ is no token, and neither is AKIA",
    "2026-11-27T18:00:00+00:00 INFO 10.0.0.1:8080 -> [::1]:443",
]


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_secret_stays(text):
    assert without_secrets(text) == text


@pytest.mark.parametrize("seed", range(40))
def test_digests_and_random_words_stay(seed):
    chance = random.Random(seed)
    words = [
        made_up(chance.choice([HEX, BASE64, string.ascii_lowercase]), chance.randrange(1, 70), seed * 100 + n)
        for n in range(20)
    ]
    text = " ".join(words)
    assert without_secrets(text) == text


NAMES = [
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "PREFECT_API_KEY",
    "WEBHOOK_SECRET",
    "GITHUB_TOKEN",
    "SLACK_BOT_TOKEN",
    "WANDB_API_KEY",
    "MY_DATABASE_PASSWORD",
    "CLIENT_SECRET",
]
AWKWARD = ["p@ss/word?x=1&y#z", 'quo"te\\and\\slash', "with space and ümlaut", "100%+plus=signs", "'single'"]


def forms(secret: str) -> dict[str, str]:
    pair = base64.b64encode(f"someone:{secret}".encode()).decode()
    return {
        "plain": secret,
        "quoted": urllib.parse.quote(secret, safe=""),
        "quoted but for slashes": urllib.parse.quote(secret),
        "quoted with plus": urllib.parse.quote_plus(secret),
        "JSON": json.dumps({"x": secret}),
        "Python": repr([secret]),
        "base64": base64.b64encode(secret.encode()).decode(),
        "base64 of user and password": pair,
        "base64 for addresses": base64.urlsafe_b64encode(f"u:{secret}:v".encode()).decode(),
        "hex": secret.encode().hex(),
    }


@pytest.mark.parametrize("form", forms(""))
@pytest.mark.parametrize("name", NAMES)
def test_secrets_of_the_environment_are_blotted_out_in_every_form(monkeypatch, name, form):
    for seed, secret in enumerate([made_up(BASE64, 40, 9), *AWKWARD, secrets.token_urlsafe(24)]):
        if name.endswith("_KEY") and name == "WANDB_API_KEY":
            secret = f"{secret}{made_up(HEX, 20, seed)}0a"
        monkeypatch.setenv(name, secret)
        redacted = without_secrets(f"before {forms(secret)[form]} after")
        assert not in_bytes(redacted.encode(), {"it": secret}), (name, form)
        assert redacted.startswith("before ") and redacted.endswith(" after")


def test_secrets_of_authentication_strings_and_addresses_are_known_alone(monkeypatch):
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "admin:hunter2hunter2")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:p%40ss%2Fword1@db/x")
    text = without_secrets("hunter2hunter2, p%40ss%2Fword1, p@ss/word1")
    assert text == "***, ***, ***"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CACHE_KEY", "sfgrpo-shapes-cache"),
        ("SORT_KEY", "1234567890123456"),
        ("SSL_KEY", "/etc/hostname"),
        ("X_TOKEN", "short"),
        ("MONKEY", "aaaa1111bbbb2222"),
        ("PWD", "/work/somewhere/deleted"),
        ("KEYBOARD", "aaaa1111bbbb2222"),
        ("USE_TOKEN", "true"),
    ],
)
def test_variables_that_hold_no_secret_are_left_alone(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert without_secrets(f"it is {value}.") == f"it is {value}."


@pytest.mark.parametrize(
    ("secret", "text", "redacted"),
    [
        ("abc", "abc abcd", "abc abcd"),
        ("admin", "admin administers as admin.", "*** administers as ***."),
        ("hunter22", "xhunter22x", "x***x"),
    ],
)
def test_short_secret_takes_no_part_of_a_word(monkeypatch, secret, text, redacted):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", secret)
    assert without_secrets(text) == redacted


@pytest.mark.parametrize(
    ("variable", "name", "content"),
    [
        ("AWS_SHARED_CREDENTIALS_FILE", ".aws/credentials", "[default]\naws_secret_access_key = {}\n"),
        ("HF_TOKEN_PATH", ".cache/huggingface/token", "{}\n"),
        ("MLFLOW_TRACKING_CREDENTIALS", ".mlflow/credentials", "[mlflow]\nmlflow_tracking_password = {}\n"),
        ("PREFECT_PROFILES_PATH", ".prefect/profiles.toml", '[profiles.x]\nPREFECT_API_KEY = "{}"\n'),
    ],
)
def test_secrets_of_files_are_known(monkeypatch, tmp_path, variable, name, content):
    secret = f"{made_up(BASE64, 36, 11)}0aZ1"
    for path in (tmp_path / name, tmp_path / "elsewhere"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content.format(secret))
        assert without_secrets(f"({secret})") == "(***)"
        path.unlink()
        monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    assert without_secrets(f"({secret})") == f"({secret})"


@pytest.mark.parametrize(
    ("address", "kept"),
    [
        ("http://me:secret@host:5000", "http://host:5000"),
        ("http://me:se/cr@et?x#y@host:5000/mlflow/", "http://host:5000/mlflow/"),
        ("https://token@host/x", "https://host/x"),
        ("https://me:with space \"'@host/x", "https://host/x"),
        ("postgresql+psycopg2://me:secret@db:5432/mlflow?sslpassword=x", "postgresql+psycopg2://db:5432/mlflow"),
        ("sqlite:////home/me@work/mlflow.db?key=x", "sqlite:////home/me@work/mlflow.db"),
        ("sqlite:///mlflow.db", "sqlite:///mlflow.db"),
        ("http://host:5000/a@b?token=x#y", "http://host:5000/a@b"),
        ("http://host:5000", "http://host:5000"),
        ("databricks", "databricks"),
        ("", ""),
    ],
)
def test_address_is_kept_without_its_credentials(address, kept):
    assert without_credentials(address) == kept


@pytest.mark.parametrize("name", ["SFGRPO_MIRROR", "SFGRPO_DVC_REMOTE"])
@pytest.mark.parametrize("value", ["s3://me:S3cretxyz@bucket/x", "s3x://me:S3c/retxyz@bucket", "s3://me@bucket"])
def test_wrong_settings_are_shown_without_their_secrets(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"\*\*\*@bucket.*correct or unset the variable") as refusal:
        read_environment()
    assert "retxyz" not in str(refusal.value)


@pytest.mark.parametrize(
    "password", ["S3cretxyz/more", "S3cretxyz?more", "S3cretxyz#more", "S3cretxyz@more/x", "S3cretxyz"]
)
@pytest.mark.parametrize("scheme", ["postgresql", "http", "mysql+pymysql", "oracle", "sqlite"])
def test_wrong_tracking_address_is_shown_without_its_password(monkeypatch, scheme, password):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{scheme}://me:{password}@db:port/x y")
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI") as refusal:
        read_environment()
    assert "S3cretxyz" not in str(refusal.value) and "more" not in str(refusal.value)


def test_traceback_is_redacted(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "p@ss/w\\ord")
    try:
        raise ValueError({"password": "p@ss/w\\ord"})
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "sent %s", ("p@ss/w\\ord",), sys.exc_info())
    text = SecretFreeFormatter().format(record)
    assert "sent ***" in text and "ss/w" not in text


@pytest.mark.parametrize("text", ["a-" * 50_000, "password" * 10_000, "://" * 10_000, "a.b=" * 25_000, "\n " * 50_000])
def test_long_texts_take_no_long_time(text):
    start = time.monotonic()
    without_secrets(text)
    assert time.monotonic() - start < 5


def test_secrets_are_known_though_they_are_set_later():
    program = "import os; from sfgrpo.runtime.redaction import without_secrets; os.environ['X_TOKEN'] = 'abcdefgh1'; "
    shown = subprocess.check_output(
        [sys.executable, "-c", program + "print(without_secrets('abcdefgh1'))"], cwd=ROOT, text=True
    )
    assert shown == "***\n"
