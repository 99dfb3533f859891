"""The modules, as Terraform itself reads them: formatted, valid against the providers' schemas, tested, planned.

No provider is downloaded: ``tools/terraform_stub.py`` serves excerpts of their schemas. Nothing here speaks to a cloud,
and a green run is no proof that one takes what is planned.

(Past 350 lines: what Terraform is asked, module by module, with one stub.)
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml  # type: ignore[import-untyped, unused-ignore]

from cloudckpt.core.rights import Role
from tests.terraform.iam import MODULES, ROOT, filled_in
from tests.tooling import tool_module

TERRAFORM = next((found for found in map(shutil.which, ("terraform", "tofu")) if found), None)
SCHEMAS = ROOT / "tests" / "terraform" / "schema"
FOLDERS = ("modules/aws", "modules/gcp", "examples/aws-spot", "examples/gcp-gke")
#: What serves the stub pins so much that it lives in an environment of its own.
_TOOLS = ROOT / ".venv-terraform" / "bin" / "python"

Run = Callable[..., str]

pytestmark = pytest.mark.processes


def _fail_in_ci(reason: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def _need_terraform() -> str:
    if TERRAFORM is None:
        _fail_in_ci("neither terraform (1.7 or newer) nor tofu (1.8 or newer) is installed; no package of PyPI has one")
    return TERRAFORM


@pytest.fixture(scope="session")
def stub() -> Iterator[str]:
    """What TF_REATTACH_PROVIDERS must be for Terraform to find the stub of both providers."""
    _need_terraform()
    if not _TOOLS.exists():
        _fail_in_ci("what serves the stub is not installed: make .venv-terraform/.ready")
    if not all((SCHEMAS / f"{name}.json").exists() for name in ("aws", "google")):
        _fail_in_ci("there are no excerpts of the schemas: python tools/terraform_schema.py --download")
    command = [_TOOLS, ROOT / "tools" / "terraform_stub.py"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        # Without this line Terraform would look for the providers in the registry, and say nothing of the stub.
        found = process.stdout.readline().strip()
        if not found:
            pytest.fail(f"the stub ended with {process.wait()} before it served; its traceback stands above")
        yield found
        process.stdin.close()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A copy of ``terraform/``: Terraform writes beside what it reads."""
    return shutil.copytree(ROOT / "terraform", tmp_path / "terraform", ignore=shutil.ignore_patterns(".terraform*"))


@pytest.fixture
def run(stub: str) -> Run:
    """Runs Terraform in a folder; its output. ``fails=True``: it must fail."""
    terraform = _need_terraform()

    def call(folder: Path, *arguments: str, fails: bool = False) -> str:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("TF_", "AWS_", "GOOGLE_"))},
            "TF_REATTACH_PROVIDERS": stub,
            "TF_IN_AUTOMATION": "1",
            "TF_CLI_CONFIG_FILE": os.devnull,
            "CHECKPOINT_DISABLE": "1",
        }
        done = subprocess.run(
            [terraform, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode != 0) is fails, done.stdout + done.stderr
        return done.stdout

    return call


def initialised(run: Run, folder: Path) -> Path:
    """A folder after ``init``."""
    run(folder, "init", "-backend=false", "-input=false", "-no-color")
    return folder


def plan_of(run: Run, folder: Path, **variables: Any) -> dict[str, Any]:
    """What a plan says of resources and outputs."""
    (initialised(run, folder) / "terraform.tfvars.json").write_text(json.dumps(variables))
    run(folder, "plan", "-input=false", "-no-color", "-out=plan")
    values: dict[str, Any] = json.loads(run(folder, "show", "-json", "plan"))["planned_values"]
    return values


def outputs(run: Run, folder: Path, **variables: Any) -> dict[str, Any]:
    """The outputs that a plan knows, by name."""
    found = plan_of(run, folder, **variables)["outputs"]
    return {name: output["value"] for name, output in found.items() if "value" in output}


def planned(run: Run, folder: Path, **variables: Any) -> dict[str, dict[str, Any]]:
    """The planned values of every resource, by address; none where all of them are known at apply only."""
    root = plan_of(run, folder, **variables)["root_module"]

    def resources(module: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        for resource in module.get("resources", ()):
            yield resource["address"], resource.get("values", {})
        for child in module.get("child_modules", ()):
            yield from resources(child)

    return dict(resources(root))


def test_everything_is_formatted() -> None:
    """``terraform fmt`` has nothing to change; the tool that makes the READMEs' tables relies on it."""
    done = subprocess.run(
        [_need_terraform(), "fmt", "-check", "-recursive", "-diff", str(ROOT / "terraform")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_resource_and_argument_is_in_the_providers_schema(folder: str, place: Path, run: Run) -> None:
    """``terraform validate`` finds neither errors nor warnings in modules and examples."""
    found = json.loads(run(initialised(run, place / folder), "validate", "-json"))
    assert (found["valid"], found["diagnostics"]) == (True, [])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("restrict_public_buckets = true", "restrict_public_bucket = true", "Unsupported argument"),
        ("  policy = local.guard\n", "", "Missing required argument"),
        (
            "    abort_incomplete_multipart_upload {",
            "    abort_incomplete_multipart_uploads {",
            "Unsupported block type",
        ),
        ("block_public_acls       = true", 'block_public_acls       = "perhaps"', "Incorrect attribute value type"),
        ('resource "aws_s3_bucket_logging"', 'resource "aws_s3_bucket_log"', "Invalid resource type"),
    ],
)
def test_what_the_schema_does_not_have_is_an_error(old: str, new: str, said: str, place: Path, run: Run) -> None:
    """The stub's schemas are strict: names of resources, blocks and arguments, types, and what must be given."""
    folder = place / "modules" / "aws"
    text = (folder / "main.tf").read_text()
    assert text.count(old) == 1
    (folder / "main.tf").write_text(text.replace(old, new))
    found = json.loads(run(initialised(run, folder), "validate", "-json", fails=True))
    assert said in {diagnostic["summary"] for diagnostic in found["diagnostics"]}


@pytest.mark.parametrize("module", ["aws", "gcp"])
def test_the_modules_own_tests_pass(module: str, place: Path, run: Run) -> None:
    """``terraform test`` with mocks: the guard rails, who is trusted, what is refused."""
    assert ", 0 failed" in run(initialised(run, place / "modules" / module), "test", "-no-color")


@pytest.mark.parametrize(
    ("name", "file", "old", "new"),
    [
        ("defaults", "aws/main.tf", "expired_object_delete_marker = true", "days = 30"),
        (
            "defaults",
            "aws/main.tf",
            "noncurrent_days = var.recovery_days.manifest",
            "noncurrent_days = var.recovery_days.manifest\n      newer_noncurrent_versions = 20",
        ),
        ("defaults", "aws/main.tf", "block_public_policy     = true", "block_public_policy     = false"),
        ("defaults", "aws/main.tf", "force_destroy = false", "force_destroy = true"),
        ("defaults", "aws/policies/trainer.json", '"s3:AbortMultipartUpload"', '"s3:DeleteObjectVersion"'),
        ("defaults", "aws/policies/reader.json", '"s3:GetObject"', '"s3:PutObject"'),
        ("who", "aws/iam.tf", "system:serviceaccount:${i.namespace}:${i.service_account}", "system:serviceaccount:*"),
        ("who", "aws/iam.tf", '"sts.amazonaws.com"', '"anybody"'),
        (
            "defaults",
            "gcp/main.tf",
            'public_access_prevention    = "enforced"',
            'public_access_prevention    = "inherited"',
        ),
        ("defaults", "gcp/main.tf", 'with_state                 = "ARCHIVED"', 'with_state                 = "ANY"'),
        (
            "defaults",
            "gcp/main.tf",
            "matches_suffix             = ",
            "num_newer_versions = 20\n        matches_suffix = ",
        ),
        ("who", "gcp/iam.tf", "expression  = local.under_the_prefix", 'expression  = "true"'),
        (
            "defaults",
            "gcp/permissions.json",
            '"reader": {\n    "prefix": [',
            '"reader": {\n    "prefix": [\n      "storage.objects.delete",',
        ),
    ],
)
def test_the_modules_own_tests_bite(name: str, file: str, old: str, new: str, place: Path, run: Run) -> None:
    """Each planted fault makes the run of ``terraform test`` fail that watches over it, with an assertion."""
    path = place / "modules" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    module = place / "modules" / file.split("/", maxsplit=1)[0]
    # The other runs would cost as much again each, and say nothing.
    tests = module / "tests" / "unit.tftest.hcl"
    first, *runs = re.split(r'^(?=run ")', tests.read_text(), flags=re.MULTILINE)
    (only,) = [found for found in runs if found.startswith(f'run "{name}"')]
    tests.write_text(first + only)
    said = run(initialised(run, module), "test", "-no-color", fails=True)
    assert f'run "{name}"... fail' in said


@pytest.mark.parametrize("key", [None, "arn:aws:kms:::key/k"], ids=["SSE-S3", "own key"])
def test_the_planned_policies_are_those_of_the_table(key: str | None, place: Path, run: Run) -> None:
    """What Terraform would send to IAM and S3 is what the tests of the roles judge, statement by statement."""
    found = planned(run, place / "modules" / "aws", bucket_name="ckpt-test", prefix="team/runs", kms_key_arn=key)
    names = {"bucket": "ckpt-test", "key_prefix": "team/runs/"}
    for role in Role:
        policy = json.loads(found[f'aws_iam_policy.this["{role}"]']["policy"])
        wanted = filled_in(role, **names)
        if key is not None:
            wanted["Statement"] += filled_in(f"{role}-key", **names)["Statement"]
        assert policy == wanted
    assert json.loads(found["aws_s3_bucket_policy.this"]["policy"]) == filled_in("guard", **names)


def test_the_planned_permissions_are_those_of_the_table(place: Path, run: Run) -> None:
    """What Terraform would send to Google's IAM is what permissions.json says, bound with the condition."""
    found = planned(
        run,
        place / "modules" / "gcp",
        project="p",
        project_number="123",
        bucket_name="ckpt-test",
        location="europe-west4",
        prefix="team/runs",
        trainer={"gke": ["train/trainer"]},
    )
    permissions = json.loads((MODULES / "gcp" / "permissions.json").read_text(encoding="utf-8"))
    for role in Role:
        made = found[f'google_project_iam_custom_role.this["{role}"]']
        assert sorted(made["permissions"]) == permissions[role]["prefix"]
    uploads = found["google_project_iam_custom_role.uploads"]["permissions"]
    assert uploads == permissions["trainer"]["bucket"] == permissions["sweeper"]["bucket"]
    (condition,) = found['google_storage_bucket_iam_member.this["trainer:gke:train/trainer"]']["condition"]
    assert condition["expression"] == (
        'resource.name.startsWith("projects/_/buckets/ckpt-test/objects/team/runs/") || '
        'api.getAttribute("storage.googleapis.com/objectListPrefix", "").startsWith("team/runs/")'
    )


#: Different from the defaults and from each other.
RECOVERY = {"data": 2, "manifest": 9}


def _s3_keeps(rules: list[dict[str, Any]], *, size_bytes: int | None, newer: int = 0) -> float:
    """For how many days S3 keeps a version that is no longer current (PUT Bucket lifecycle, NoncurrentVersionExpiration).

    A version goes when its days have passed *and* as many newer noncurrent versions exist as the rule keeps; of rules
    that overlap the shortest holds. A delete marker has no size (None): whether a filter by size takes one is not
    documented, so only a rule without such a filter counts for it.
    """

    def takes(rule: dict[str, Any]) -> bool:
        limits: dict[str, Any] = next(iter(rule["filter"]), {})
        above, below = limits.get("object_size_greater_than"), limits.get("object_size_less_than")
        if size_bytes is None:
            return above is None and below is None
        return (above is None or size_bytes > int(above)) and (below is None or size_bytes < int(below))

    return min(
        (
            float(expiration["noncurrent_days"])
            for rule in rules
            if rule["status"] == "Enabled" and takes(rule)
            for expiration in rule["noncurrent_version_expiration"]
            if newer >= int(expiration["newer_noncurrent_versions"] or 0)
        ),
        default=math.inf,
    )


def test_what_was_deleted_from_s3_is_gone_after_its_days(place: Path, run: Run) -> None:
    """No key is written twice but the manifest's: what is deleted has no newer version, and still goes, with its marker."""
    found = planned(run, place / "modules" / "aws", bucket_name="ckpt-test", recovery_days=RECOVERY)
    rules = found["aws_s3_bucket_lifecycle_configuration.this"]["rule"]
    edge = 1024 * 1024
    kept = {size: _s3_keeps(rules, size_bytes=size) for size in (0, 300, edge, edge + 1, 5 * 1024**3)}
    assert kept == {0: 9, 300: 9, edge: 9, edge + 1: 2, 5 * 1024**3: 2}
    # A manifest of each of the last days, however many versions a day has; a second delete makes a marker noncurrent.
    assert {_s3_keeps(rules, size_bytes=300, newer=newer) for newer in (1, 19, 20, 1000)} == {9}
    assert _s3_keeps(rules, size_bytes=None) == 9
    # The marker that is left alone then: a rule without a filter takes it.
    alone = [r for r in rules for e in r["expiration"] if e["expired_object_delete_marker"]]
    assert [(r["status"], r["filter"]) for r in alone] == [("Enabled", [_NO_FILTER])]


#: How a plan says ``filter {}``.
_NO_FILTER: dict[str, Any] = {
    "and": [],
    "object_size_greater_than": None,
    "object_size_less_than": None,
    "prefix": None,
    "tag": [],
}


def test_what_was_deleted_from_google_is_gone_after_its_days(place: Path, run: Run) -> None:
    """The same there, where all conditions of a rule must hold: none of them counts newer versions."""
    variables = {"project": "p", "bucket_name": "ckpt-test", "location": "europe-west4", "recovery_days": RECOVERY}
    found = planned(run, place / "modules" / "gcp", **variables)
    rules = [
        rule["condition"][0]
        for rule in found["google_storage_bucket.this"]["lifecycle_rule"]
        if rule["action"][0]["type"] == "Delete"
    ]
    assert [(rule["with_state"], rule.get("num_newer_versions")) for rule in rules] == [("ARCHIVED", None)] * 3
    for name, days in (("model-00000-of-00001.safetensors", 2), ("checkpoint.json", 9), ("manifest.json", 9), ("x", 9)):
        kept = [
            rule["days_since_noncurrent_time"] for rule in rules if name.endswith(tuple(rule["matches_suffix"] or [""]))
        ]
        assert min(kept) == days, name


def test_the_spot_example_plans(place: Path, run: Run) -> None:
    """The example for EC2 makes the bucket with all its guard rails, the policies, and one job's identity; its script is bash."""
    found = planned(
        run,
        place / "examples" / "aws-spot",
        region="eu-west-1",
        bucket_name="ckpt-test",
        image_id="ami-1",
        vpc_id="vpc-1",
        route_table_ids=["rtb-1"],
        subnet_ids=["subnet-1"],
        readers=["arn:aws:iam::111122223333:role/eval"],
    )
    of_the_module = {address.removeprefix("module.checkpoints.") for address in found if address.startswith("module.")}
    assert of_the_module == {
        "aws_s3_bucket.this",
        "aws_s3_bucket_lifecycle_configuration.this",
        "aws_s3_bucket_ownership_controls.this",
        "aws_s3_bucket_policy.this",
        "aws_s3_bucket_public_access_block.this",
        "aws_s3_bucket_server_side_encryption_configuration.this",
        "aws_s3_bucket_versioning.this",
        "aws_vpc_endpoint.s3[0]",
        'aws_iam_instance_profile.this["trainer"]',
        *(f'aws_iam_policy.this["{role}"]' for role in Role),
        *(f'aws_iam_role{end}.this["{role}"]' for end in ("", "_policy_attachment") for role in ("trainer", "reader")),
    } | {address for address in of_the_module if address.startswith("data.")}
    assert {address for address in found if not address.startswith("module.")} == {
        "aws_launch_template.trainer",
        "aws_autoscaling_group.trainer",
    }
    # What the instance runs: the region is the provider's own, which a plan knows.
    script = base64.b64decode(found["aws_launch_template.trainer"]["user_data"]).decode()
    assert 'export AWS_DEFAULT_REGION="eu-west-1"\n' in script
    assert 'export CLOUDCKPT_ROOT="s3://ckpt-test/runs"\n' in script
    assert script.endswith("\npython train.py\n")
    read = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert (read.returncode, read.stderr) == (0, "")


def test_the_gke_example_plans(place: Path, run: Run) -> None:
    """The example for GKE binds the job's Kubernetes service account and the sweeper's, and makes no key."""
    found = planned(
        run,
        place / "examples" / "gcp-gke",
        project="p",
        location="europe-west4",
        bucket_name="ckpt-test",
        image="image",
    )
    members = {
        address: values["member"]
        for address, values in found.items()
        if address.startswith("module.checkpoints.google_storage_bucket_iam_member.this")
    }
    pool = "principal://iam.googleapis.com/projects/123456789012/locations/global/workloadIdentityPools/p.svc.id.goog"
    assert sorted(members.values()) == [
        f"{pool}/subject/ns/training/sa/trainer",
        f"{pool}/subject/ns/training/sa/trainer-sweeper",
    ]
    assert not [address for address in found if "service_account_key" in address]


def test_the_manifests_of_the_gke_example_are_kubernetes_own(place: Path, run: Run) -> None:
    """What is piped to kubectl is YAML: two service accounts, the job in one's name and the nightly gc in the other's."""
    found = outputs(
        run,
        place / "examples" / "gcp-gke",
        project="p",
        location="europe-west4",
        bucket_name="ckpt-test",
        image="image",
    )
    trainer, sweeper, job, timer = yaml.safe_load_all(found["manifests"])
    assert [document["kind"] for document in (trainer, sweeper, job, timer)] == [
        "ServiceAccount",
        "ServiceAccount",
        "Job",
        "CronJob",
    ]
    assert {document["metadata"]["namespace"] for document in (trainer, sweeper, job, timer)} == {"training"}
    pod = job["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == trainer["metadata"]["name"] == "trainer"
    environment = {variable["name"]: variable["value"] for variable in pod["containers"][0]["env"]}
    assert environment == {"CLOUDCKPT_ROOT": "gs://ckpt-test/runs/demo", "GOOGLE_CLOUD_PROJECT": "p"}
    assert environment["CLOUDCKPT_ROOT"] == found["cloudckpt_root"]
    nightly = timer["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert nightly["serviceAccountName"] == sweeper["metadata"]["name"]
    assert found["cloudckpt_root"] in nightly["containers"][0]["command"][-1]
    compile(nightly["containers"][0]["command"][-1], "the sweeper's command", "exec")


@pytest.mark.parametrize(
    ("module", "fixture", "variables"),
    [("aws", "s3_root", {}), ("gcp", "gcs_root", {"project": "p", "location": "europe-west4"})],
)
def test_the_outputs_feed_the_program(
    module: str, fixture: str, variables: dict[str, str], place: Path, run: Run, request: pytest.FixtureRequest
) -> None:
    """With the variables that a module puts out, and no root, the doctor goes to the bucket and is content."""
    root = request.getfixturevalue(fixture)
    found = outputs(run, place / "modules" / module, bucket_name=root.split("/")[2], prefix="run", **variables)
    assert found["cloudckpt_root"] == root
    done = subprocess.run(
        [sys.executable, "-m", "cloudckpt", "doctor", "--role", "trainer", "--json"],
        env={**os.environ, **found["environment"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["root"] == root


def test_the_excerpts_have_every_type_that_is_used() -> None:
    """The schemas are of the pinned bindings, and of exactly the types that modules and examples use."""
    tool = tool_module("terraform_schema")
    for provider, wanted in tool.used().items():
        path = SCHEMAS / f"{provider}.json"
        if not path.exists():
            _fail_in_ci("there are no excerpts of the schemas: python tools/terraform_schema.py --download")
        found = json.loads(path.read_text(encoding="utf-8"))
        assert found["binding"] == tool.BINDINGS[provider]
        assert {kind: set(found[kind]) for kind in wanted} == wanted
