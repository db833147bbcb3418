"""The files of `ray up`: the launcher takes them, no key is misspelt, and what they name is there."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import yaml
from aiobotocore.client import AioBaseClient
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

from lib.engine.workers import parse_labels
from lib.storage.folder import Folder
from tests.conftest import use
from tests.real.autoscaler import start_line
from tests.real.health import HEALTH
from tests.real.s3 import Ceph, Swift

CLUSTER = Path(__file__).parents[2] / "cluster"
FILES = ["aws", "gcp"]
MARKET, ACCELERATOR = "ray.io/market-type", "ray.io/accelerator-type"
SPOT, ON_DEMAND = "-spot", "-on-demand"
# What the providers read of their section, which Ray's schema leaves open.
PROVIDER_KEYS = {
    "aws": {"type", "region", "availability_zone", "cache_stopped_nodes", "use_internal_ips", "security_group"},
    "gcp": {"type", "region", "availability_zone", "project_id"},
}
# Of a machine of Google Compute Engine, as far as we say anything; AWS's is in botocore.
GCP_KEYS = {
    "node": {"machineType", "disks", "metadata", "serviceAccounts", "scheduling"},
    "disks": {"boot", "autoDelete", "type", "interface", "initializeParams"},
    "serviceAccounts": {"email", "scopes"},
    "scheduling": {"provisioningModel", "instanceTerminationAction", "onHostMaintenance"},
}
# CPUs and GPUs of the machines, from the providers' pages.
MACHINES = {
    "g6.2xlarge": {"CPU": 8, "GPU": 1},
    "g6e.2xlarge": {"CPU": 8, "GPU": 1},
    "c6id.2xlarge": {"CPU": 8},
    "g2-standard-8": {"CPU": 8, "GPU": 1},
    "a2-highgpu-1g": {"CPU": 12, "GPU": 1},
    "n2-standard-8": {"CPU": 8},
}
# The S3 calls that Shoal makes, and the right that each needs.
RIGHTS = {
    "ListObjectsV2": "s3:ListBucket",
    "HeadBucket": "s3:ListBucket",
    "HeadObject": "s3:GetObject",
    "GetObject": "s3:GetObject",
    "PutObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "DeleteObject": "s3:DeleteObject",
    "DeleteObjects": "s3:DeleteObject",
}


@pytest.fixture(params=FILES)
def config(request) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / f"{request.param}.yaml").read_text())


def workers(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]}


def check(config: dict[str, Any]) -> None:
    """As `ray up` does, and the sections that Ray's schema leaves open too. Raises for what is misspelt."""
    validate_config(prepare_config(copy.deepcopy(config)))
    provider = config["provider"]["type"]
    assert not config["provider"].keys() - PROVIDER_KEYS[provider]
    for kind in config["available_node_types"].values():
        check_aws(kind["node_config"]) if provider == "aws" else check_gcp(kind["node_config"])


def check_aws(machine: dict[str, Any]) -> None:
    shape = botocore.session.Session().get_service_model("ec2").operation_model("RunInstances").input_shape
    report = ParamValidator().validate({"MinCount": 1, "MaxCount": 1, **machine}, shape)
    assert not report.has_errors(), report.generate_report()


def check_gcp(machine: dict[str, Any]) -> None:
    assert not machine.keys() - GCP_KEYS["node"]
    for section in GCP_KEYS.keys() & machine.keys():
        assert all(not item.keys() - GCP_KEYS[section] for item in machine[section])


def test_the_launcher_takes_the_file(config):
    """Ray's own preparation and schema, EC2's own request, and our lists of the rest accept every key and value."""
    check(config)


@pytest.mark.parametrize(
    "section",
    [
        lambda c: c,
        lambda c: c["provider"],
        lambda c: c["docker"],
        lambda c: workers(c)["l4-spot"],
        lambda c: workers(c)["l4-spot"]["docker"],
        lambda c: workers(c)["l4-spot"]["node_config"],
    ],
    ids=["top", "provider", "docker", "type", "type-docker", "machine"],
)
def test_a_misspelt_key_fails(config, section):
    """A key that nobody knows is refused, wherever it stands."""
    section(config)["max_worker"] = 1

    with pytest.raises(Exception, match="max_worker"):
        check(config)


@pytest.mark.parametrize("name", ["head", "worker"])
def test_the_start_lines(config, name):
    """Every node starts with token authentication, the autoscaler that knows labels, and the settings that notice a lost
    host, and with options that `ray start` knows."""
    variables, options = start_line(config[f"{name}_start_ray_commands"])

    assert variables == HEALTH | {"RAY_AUTH_MODE": "token", "RAY_enable_autoscaler_v2": "1"}
    said = start.make_context("ray start", options).params
    assert said["head"] is (name == "head")
    assert said["autoscaling_config"] == ("~/ray_bootstrap_config.yaml" if name == "head" else None)


def test_the_dashboard_answers_on_loopback(config):
    """The head's dashboard, which runs what it is sent, listens on 127.0.0.1 alone."""
    _, options = start_line(config["head_start_ray_commands"])

    assert start.make_context("ray start", options).params["dashboard_host"] == "127.0.0.1"


def test_only_the_token_is_copied(config):
    """The token goes to the home of the image's user on every node, and no code does: that comes with the job."""
    home = re.findall(r"(?m)^WORKDIR (/home/\S+)$", (CLUSTER / "Dockerfile").read_text())
    assert config["file_mounts"] == {f"{folder}/.ray/auth_token": "~/.ray/auth_token" for folder in home}


@pytest.mark.parametrize("name", ["head", "worker"])
def test_what_is_large_lies_on_the_local_disk(config, name):
    """Spilled objects and models lie in folders of the mounted disk that are made before the container starts."""
    _, options = start_line(config[f"{name}_start_ray_commands"])
    run = " ".join(config["docker"]["run_options"])
    outside, inside = re.search(r"--volume (\S+):(\S+)", run).groups()
    folders = [start.make_context("ray start", options).params["object_spilling_directory"]]
    folders.append(re.search(r"HF_HOME=(\S+)", run)[1])

    made = re.findall(r"mkdir -p ([^&;]+)", " ".join(config["initialization_commands"]))
    for folder in folders:
        assert folder.startswith(f"{inside}/")
        assert f"{outside}{folder.removeprefix(inside)}" in " ".join(made).split()


def test_no_work_lands_on_the_head(config):
    """The head is on demand and has no CPU and no GPU for Ray, so only drivers run there."""
    head = config["available_node_types"][config["head_node_type"]]

    assert head["resources"] == {"CPU": 0}
    assert not is_spot(head["node_config"])


def test_every_worker_type_says_what_it_has(config):
    """Workers start from zero and are stopped when idle; their resources are stated, and are those of the machine."""
    for kind in workers(config).values():
        machine = kind["node_config"].get("InstanceType") or kind["node_config"]["machineType"]
        assert {k: v for k, v in kind["resources"].items() if k != "memory"} == MACHINES[machine]
        assert kind["min_workers"] == 0
        assert 0 < kind["max_workers"] <= config["max_workers"]
    assert 0 < config["idle_timeout_minutes"] <= 15


def test_labels_are_those_of_worker_label(config):
    """Each type has the market as a label, and GPU types the accelerator; --worker-label takes them as they stand."""
    for name, kind in workers(config).items():
        labels = kind["labels"]
        assert parse_labels(f"{key}={value}" for key, value in labels.items()) == labels
        assert labels[MARKET] == name.split("-", 1)[1]
        assert ("GPU" in kind["resources"]) == (ACCELERATOR in labels)
        assert labels.get(ACCELERATOR, "CPU").lower() == name.split("-")[0]
    assert len({kind["labels"].get(ACCELERATOR) for kind in workers(config).values()} - {None}) == 2


def is_spot(machine: dict[str, Any]) -> bool:
    scheduling = machine.get("scheduling", [{}])[0]
    market = machine.get("InstanceMarketOptions", {}).get("MarketType")
    return market == "spot" or scheduling.get("provisioningModel") == "SPOT"


def test_spot_comes_before_its_twin_on_demand(config):
    """Each machine is there as spot, and, of lower priority and alike but for the market, on demand."""
    kinds = workers(config)
    spots = [name for name in kinds if name.endswith(SPOT)]
    assert len(kinds) == 2 * len(spots)
    for name in spots:
        spot, twin = kinds[name], kinds[name.removesuffix(SPOT) + ON_DEMAND]
        assert spot["priority"] > twin["priority"]
        assert is_spot(spot["node_config"])
        assert not is_spot(twin["node_config"])
        assert all(spot[key] == twin[key] for key in ("resources", "min_workers"))
        market = ("InstanceMarketOptions", "scheduling")
        assert without(spot["node_config"], market) == without(twin["node_config"], market)


def without(table: dict[str, Any], gone: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key not in gone}


def test_images_are_variants_of_the_dockerfile(config):
    """Machines with a GPU run the image of the CUDA stage of cluster/Dockerfile, the others that of the CPU stage."""
    stages = re.findall(r"(?mi)^FROM \S+ AS (\S+)", (CLUSTER / "Dockerfile").read_text())
    for kind in config["available_node_types"].values():
        image = kind.get("docker", {}).get("worker_image", config["docker"]["image"])
        wanted = "cuda" if "GPU" in kind["resources"] else "cpu"
        assert image.endswith(f"/shoal:{wanted}")
        assert wanted in stages


def test_every_gpu_reaches_the_container(config):
    """Docker gives a container no GPU that it is not asked for."""
    for kind in workers(config).values():
        given = kind.get("docker", {}).get("worker_run_options", [])
        assert given == (["--gpus all"] if "GPU" in kind["resources"] else [])


def policy_actions() -> set[str]:
    policy = json.loads((CLUSTER / "s3-policy.json").read_text())
    listed: Callable[[Any], list[str]] = lambda said: [said] if isinstance(said, str) else said  # noqa: E731
    assert all(statement["Effect"] == "Allow" for statement in policy["Statement"])
    assert all("*" not in action for statement in policy["Statement"] for action in listed(statement["Action"]))
    return {action for statement in policy["Statement"] for action in listed(statement["Action"])}


@pytest.mark.parametrize("server", ["swift" if Ceph.missing() else "ceph"], indirect=True)
@pytest.mark.skipif(bool(Ceph.missing() and Swift.missing()), reason="no S3 server")
def test_the_bucket_policy_has_the_rights_of_our_calls(server, bucket, tmp_path, monkeypatch):
    """What a folder on S3 does in all its methods, an upload that fails in the middle among them, needs the rights that
    s3-policy.json gives, and no others."""
    use({}, monkeypatch)
    called: set[str] = set()
    plain = AioBaseClient._make_api_call

    async def note(client, operation, parameters):
        called.add(operation)
        if operation == "UploadPart" and "torn" in parameters["Key"]:
            raise ValueError("cut")  # nothing that is tried again
        return await plain(client, operation, parameters)

    monkeypatch.setattr(AioBaseClient, "_make_api_call", note)
    large = tmp_path / "large"
    large.write_bytes(bytes(120 << 20))  # over one part of s3fs
    folder = Folder(f"{bucket}/runs")
    folder.probe()
    folder.publish("small", b"x")
    folder.publish("large", large.read_bytes())
    folder.put("file", str(large))
    assert folder.claim("once", b"x")
    assert folder.exists("once")
    assert folder.list().keys() == {"small", "large", "file", "once"}
    with folder.open("small") as file:
        assert file.read() == b"x"
    with pytest.raises(Exception, match="cut"):
        folder.put("torn", str(large))
    folder.remove("once")
    folder.remove_all()

    assert {RIGHTS[operation] for operation in called} == policy_actions()


def test_unfinished_uploads_are_ended_by_the_bucket():
    """s3-lifecycle.json is what S3 takes, for the whole bucket, and ends unfinished uploads after one to three days."""
    lifecycle = json.loads((CLUSTER / "s3-lifecycle.json").read_text())
    model = botocore.session.Session().get_service_model("s3").operation_model("PutBucketLifecycleConfiguration")
    report = ParamValidator().validate({"Bucket": "b", "LifecycleConfiguration": lifecycle}, model.input_shape)

    assert not report.has_errors(), report.generate_report()
    (rule,) = lifecycle["Rules"]
    assert rule["Status"] == "Enabled"
    assert rule["Filter"] == {"Prefix": ""}
    assert 1 <= rule["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"] <= 3
