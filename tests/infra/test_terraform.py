"""`infra/terraform`: formatted, valid, with the properties that its own tests assert, and applied to a mock of AWS.

Terraform finds the AWS provider in the folder that `TF_PLUGIN_DIR` names, laid out like a mirror of the registry, or in
one of the usual places. Nothing is downloaded, and AWS itself is never contacted.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sfgrpo.errors import MirrorError
from sfgrpo.storage.s3 import Bucket
from tests.support.paths import ROOT

MODULE = ROOT / "infra" / "terraform"
PLUGIN_PLACES = (
    "~/.terraform.d/plugins",
    "/usr/local/share/terraform/plugins",
    "/usr/share/terraform/plugins",
    "/opt/*",
)
PROVIDER = "registry.terraform.io/hashicorp/aws"
TIMEOUT_S = 300.0

REGION = "eu-central-1"
BUCKET = "example-sfgrpo"
FOLDERS = ("dvc", "mlflow", "runs")
ANYBODY = "arn:aws:iam::123456789012:root"
# Of an object in each folder, who may do what; the same table is in the README.
RIGHTS = {
    "trainer": {"read": {"dvc", "runs"}, "write": {"mlflow", "runs"}, "delete": {"runs"}},
    "evaluator": {"read": {"dvc", "mlflow", "runs"}, "write": {"mlflow"}, "delete": set[str]()},
    "publisher": {"read": {"dvc"}, "write": {"dvc"}, "delete": set[str]()},
    "promoter": {"read": {"mlflow"}, "write": set[str](), "delete": set[str]()},
    "collector": {"read": {"dvc"}, "write": set[str](), "delete": {"dvc", "runs"}},
    "mlflow": {"read": {"mlflow"}, "write": {"mlflow"}, "delete": {"mlflow"}},
    "flow": {"read": {"dvc", "runs"}, "write": {"dvc", "runs"}, "delete": {"runs"}},
}

# No name service knows the buckets of a mock.
OVERRIDE = """
provider "aws" {
  s3_use_path_style = true
}
"""

pytestmark = pytest.mark.skipif(
    shutil.which("terraform") is None, reason="NOT TESTED: infra/terraform, since there is no terraform on the PATH"
)


class Terraform:
    """Terraform in a copy of the module, without the settings and credentials of whoever runs it."""

    def __init__(self, folder: Path, **variables: str) -> None:
        self.folder = folder / "module"
        ignored = shutil.ignore_patterns(".terraform*", "*.tfstate*", "*.tfvars", "*.tfplan")
        shutil.copytree(MODULE, self.folder, ignore=ignored)
        self._environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "TF_CLI_CONFIG_FILE": os.devnull,
            "TF_IN_AUTOMATION": "1",
            "CHECKPOINT_DISABLE": "1",
            "AWS_EC2_METADATA_DISABLED": "true",
            **variables,
        }

    def __call__(self, *arguments: str, status: int = 0) -> str:
        """Run a command; fail with what it printed unless it ends with `status`."""
        command = ["terraform", *arguments]
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == status, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout

    def init(self) -> None:
        self("init", "-input=false", "-no-color", f"-plugin-dir={plugin_folder()}")


def plugin_folder() -> Path:
    """Return the folder of plugins; tests contact nobody but this machine, so it has to be there."""
    if given := os.environ.get("TF_PLUGIN_DIR"):
        assert Path(given, PROVIDER).is_dir(), f"TF_PLUGIN_DIR is {given}, which has no {PROVIDER}"
        return Path(given)
    places = (Path(place) for pattern in PLUGIN_PLACES for place in sorted(glob.glob(os.path.expanduser(pattern))))
    found = next((place for place in places if (place / PROVIDER).is_dir()), None)
    assert found, f"no folder has {PROVIDER}; set TF_PLUGIN_DIR to one made by `terraform providers mirror`"
    return found


@pytest.fixture(scope="module")
def terraform(tmp_path_factory: pytest.TempPathFactory) -> Terraform:
    terraform = Terraform(tmp_path_factory.mktemp("terraform"))
    terraform.init()
    return terraform


class Cloud:
    """The module, applied to a mock of AWS that speaks HTTP on this machine."""

    def __init__(self, terraform: Terraform, url: str) -> None:
        self.terraform = terraform
        self.url = url

    @functools.cached_property
    def outputs(self) -> dict[str, Any]:
        return {name: output["value"] for name, output in json.loads(self.terraform("output", "-json")).items()}

    def client(self, service: str, **credentials: str) -> Any:
        import boto3

        keys = {"aws_access_key_id": "administrator", "aws_secret_access_key": "secret"} | credentials
        return boto3.session.Session().client(service, endpoint_url=self.url, region_name=REGION, **keys)

    def network(self) -> dict[str, Any]:
        """Make what the database takes for granted."""
        ec2 = self.client("ec2")
        subnets = ec2.describe_subnets()["Subnets"]
        vpc = subnets[0]["VpcId"]
        clients = ec2.create_security_group(GroupName="clients", Description="clients", VpcId=vpc)["GroupId"]
        return {
            "vpc_id": vpc,
            "subnet_ids": [subnet["SubnetId"] for subnet in subnets],
            "client_security_group_ids": [clients],
        }

    def credentials(self, role: str) -> dict[str, str]:
        arn = self.outputs["role_arns"][role]
        taken = self.client("sts").assume_role(RoleArn=arn, RoleSessionName="test")["Credentials"]
        return {
            "aws_access_key_id": taken["AccessKeyId"],
            "aws_secret_access_key": taken["SecretAccessKey"],
            "aws_session_token": taken["SessionToken"],
        }


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        terraform = Terraform(
            tmp_path_factory.mktemp("cloud"),
            AWS_ENDPOINT_URL=url,
            AWS_ACCESS_KEY_ID="administrator",
            AWS_SECRET_ACCESS_KEY="secret",
        )
        cloud = Cloud(terraform, url)
        values = {
            "region": REGION,
            "bucket": BUCKET,
            "trust": {role: {"principals": [ANYBODY]} for role in RIGHTS},
            "database": cloud.network(),
        }
        (terraform.folder / "mock_override.tf").write_text(OVERRIDE)
        (terraform.folder / "terraform.tfvars.json").write_text(json.dumps(values))
        terraform.init()
        terraform("apply", "-auto-approve", "-input=false", "-no-color")
        yield cloud
    finally:
        server.stop()


def test_the_files_are_formatted(terraform: Terraform) -> None:
    terraform("fmt", "-check", "-diff", "-recursive", "-no-color")


def test_the_module_is_valid(terraform: Terraform) -> None:
    terraform("validate", "-no-color")


def test_the_example_of_variables_is_complete_and_valid(terraform: Terraform) -> None:
    example = (terraform.folder / "terraform.tfvars.example").read_text()
    test = f"""
    mock_provider "aws" {{
      mock_data "aws_partition" {{
        defaults = {{ partition = "aws", dns_suffix = "amazonaws.com" }}
      }}
    }}
    variables {{
      {example}
    }}
    run "the_example" {{
      command = plan
      assert {{
        condition     = toset(keys(aws_iam_role.this)) == toset({json.dumps(sorted(RIGHTS))})
        error_message = "The example must name all roles."
      }}
    }}
    """
    (terraform.folder / "tests" / "example.tftest.hcl").write_text(test)
    terraform("test", "-filter=tests/example.tftest.hcl", "-no-color")
    (terraform.folder / "tests" / "example.tftest.hcl").unlink()


def test_the_readme_says_what_each_role_can_do() -> None:
    rows = (line.split("|")[1:-1] for line in (MODULE / "README.md").read_text().splitlines() if line.startswith("| `"))
    told = {
        role.strip(" `"): {
            right: set(re.findall("`(.*?)`", cell))
            for right, cell in zip(("read", "write", "delete"), cells, strict=True)
        }
        for role, _, *cells in rows
    }
    assert told == RIGHTS


@pytest.mark.slow
def test_the_properties_that_its_own_tests_assert_hold(terraform: Terraform) -> None:
    output = terraform("test", "-no-color")
    assert "Success!" in output and ", 0 failed" in output, output


@pytest.mark.slow
def test_after_an_apply_a_plan_has_nothing_to_do(cloud: Cloud) -> None:
    # 2 would say that there are changes.
    cloud.terraform("plan", "-detailed-exitcode", "-input=false", "-no-color", status=0)


@pytest.mark.slow
def test_the_applied_bucket_is_closed_encrypted_and_keeps_versions(cloud: Cloud) -> None:
    s3 = cloud.client("s3")
    closed = s3.get_public_access_block(Bucket=BUCKET)["PublicAccessBlockConfiguration"]
    assert set(closed.values()) == {True} and len(closed) == 4
    encryption = s3.get_bucket_encryption(Bucket=BUCKET)["ServerSideEncryptionConfiguration"]["Rules"]
    assert [rule["ApplyServerSideEncryptionByDefault"]["SSEAlgorithm"] for rule in encryption] == ["AES256"]
    assert s3.get_bucket_versioning(Bucket=BUCKET)["Status"] == "Enabled"
    rules = s3.get_bucket_lifecycle_configuration(Bucket=BUCKET)["Rules"]
    (aborting,) = (rule for rule in rules if "AbortIncompleteMultipartUpload" in rule)
    assert (aborting["Filter"], aborting["AbortIncompleteMultipartUpload"]) == (
        {"Prefix": ""},
        {"DaysAfterInitiation": 2},
    )


@pytest.mark.slow
def test_outputs_are_what_the_programs_are_given(cloud: Cloud) -> None:
    assert cloud.outputs["mirror"] == f"s3://{BUCKET}/runs"
    assert cloud.outputs["mlflow_artifact_root"] == f"s3://{BUCKET}/mlflow"
    assert cloud.outputs["dvc_remote"] == f"s3://{BUCKET}/dvc"
    assert set(cloud.outputs["policy_arns"]) == set(cloud.outputs["role_arns"]) == set(RIGHTS)
    assert set(cloud.outputs["database"]) == {"endpoint", "secret_arn"}


@contextlib.contextmanager
def without_tls(cloud: Cloud) -> Iterator[None]:
    """Take away the bucket policy, which demands TLS; the mock speaks none."""
    s3 = cloud.client("s3")
    policy = s3.get_bucket_policy(Bucket=BUCKET)["Policy"]
    s3.delete_bucket_policy(Bucket=BUCKET)
    try:
        yield
    finally:
        s3.put_bucket_policy(Bucket=BUCKET, Policy=policy)


@contextlib.contextmanager
def rights_enforced() -> Iterator[None]:
    """Let the mock refuse what policies do not grant, also to the administrator."""
    from moto import settings

    off, settings.INITIAL_NO_AUTH_ACTION_COUNT = settings.INITIAL_NO_AUTH_ACTION_COUNT, 0
    try:
        yield
    finally:
        settings.INITIAL_NO_AUTH_ACTION_COUNT = off


@pytest.mark.slow
@pytest.mark.parametrize("role", RIGHTS)
def test_a_role_can_do_what_its_work_takes_and_no_more(cloud: Cloud, role: str) -> None:
    from botocore.exceptions import ClientError

    administrator, s3 = cloud.client("s3"), cloud.client("s3", **cloud.credentials(role))

    def may(action: Any, **arguments: Any) -> bool:
        try:
            action(Bucket=BUCKET, **arguments)
        except ClientError as error:
            assert error.response["Error"]["Code"] in {"403", "AccessDenied"}
            return False
        return True

    with without_tls(cloud):
        for folder in FOLDERS:
            administrator.put_object(Bucket=BUCKET, Key=f"{folder}/present", Body=b"")
        version = administrator.head_object(Bucket=BUCKET, Key="runs/present")["VersionId"]
    with without_tls(cloud), rights_enforced():
        assert may(s3.list_objects_v2)
        may_read = {folder for folder in FOLDERS if may(s3.get_object, Key=f"{folder}/present")}
        may_write = {folder for folder in FOLDERS if may(s3.put_object, Key=f"{folder}/new")}
        may_delete = {folder for folder in FOLDERS if may(s3.delete_object, Key=f"{folder}/present")}
        assert {"read": may_read, "write": may_write, "delete": may_delete} == RIGHTS[role]
        assert not may(s3.delete_object, Key="runs/present", VersionId=version)
        assert not may(s3.get_object, Key="elsewhere/present")
        assert not may(s3.put_bucket_versioning, VersioningConfiguration={"Status": "Suspended"})
        assert not may(s3.delete_bucket)


@pytest.mark.slow
def test_the_mirror_does_all_its_work_as_the_trainer(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(monkeypatch, cloud, "trainer")
    bucket = Bucket(f"{cloud.outputs['mirror']}/train-0123456789abcdef")
    (tmp_path / "small").write_bytes(b"state")
    # Large enough to go up in parts.
    (tmp_path / "large").write_bytes(bytes(17 * 2**20))
    with without_tls(cloud), rights_enforced():
        for name in ("small", "large"):
            with (tmp_path / name).open("rb") as file:
                bucket.put(name, file)
        assert bucket.sizes() == {"small": 5, "large": 17 * 2**20}
        assert Bucket(cloud.outputs["mirror"]).folders() == ["train-0123456789abcdef"]
        with (tmp_path / "back").open("wb") as file:
            bucket.fetch("small", file)
        bucket.remove("small")
        assert set(bucket.sizes()) == {"large"}
    assert (tmp_path / "back").read_bytes() == b"state"


@pytest.mark.slow
def test_the_mirror_says_so_where_the_role_does_not_do(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(monkeypatch, cloud, "evaluator")
    (tmp_path / "state").write_bytes(b"state")
    with (
        without_tls(cloud),
        rights_enforced(),
        (tmp_path / "state").open("rb") as file,
        pytest.raises(MirrorError, match="cannot be used with these credentials"),
    ):
        Bucket(cloud.outputs["mirror"]).put("state", file)


def use(monkeypatch: pytest.MonkeyPatch, cloud: Cloud, role: str) -> None:
    """Put the address of the mock and the credentials of the role where every S3 client looks."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", cloud.url)
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    for name, value in cloud.credentials(role).items():
        monkeypatch.setenv(name.upper(), value)
