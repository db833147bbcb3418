"""The Kubernetes manifests: every key is one, and every name is held against the repository."""

import fnmatch
import json
import re
import shutil
import subprocess
from collections.abc import Iterable
from itertools import chain
from typing import Any

import pytest
import yaml

from tests.real.health import HEALTH
from tests.repository.test_docs import parsed
from tests.support.manifests import (
    FILES,
    FOLDER,
    JOBS,
    PLAIN,
    ROOT,
    keys,
    load,
    manifests,
    misspelt,
    of_kind,
    validator,
)


@pytest.mark.parametrize("name", FILES)
def test_every_manifest_is_valid(name):
    """Each document fits its kind's schema, closed: KubeRay's own, or the keys that these manifests use."""
    for document in manifests()[name]:
        wrong = [f"{e.json_path}: {e.message[:200]}" for e in validator(document["kind"]).iter_errors(document)]
        assert wrong == []


@pytest.mark.parametrize("name", FILES)
def test_a_misspelt_key_is_seen(name):
    """Whichever key of a manifest is misspelt, at any depth, the validation fails."""
    for document in manifests()[name]:
        own = {k: v for k, v in document["spec"].items() if k != "rayClusterSpec"} if name in JOBS else None
        written = document | {"spec": own} if own else document  # the cluster's keys are those of raycluster.yaml
        paths = {tuple(step for step in path if isinstance(step, str)): path for path in keys(written)}
        unseen = [path for path in paths.values() if validator(document["kind"]).is_valid(misspelt(written, path))]
        assert validator(document["kind"]).is_valid(written)
        assert paths
        assert unseen == []


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not there")
def test_kubectl_makes_the_same():
    """`kubectl kustomize` gives every file's documents, and each RayJob the spec of raycluster.yaml."""
    said = subprocess.run(["kubectl", "kustomize", FOLDER], capture_output=True, text=True, check=True).stdout
    registry = load("kustomization.yaml")[0]["images"][0]["newName"]
    made = yaml.safe_load_all(said.replace(f"image: {registry}:", "image: shoal:"))
    written = chain(*(documents for name, documents in manifests().items() if name != "kustomization.yaml"))

    assert by_name(made) == by_name(written)


def by_name(documents: Iterable[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(each["kind"], each["metadata"]["name"]): each for each in documents}


def test_the_kustomization_lists_every_file():
    """And each document has the label by which `kubectl apply -l` chooses it: setup, cluster, or its job's name."""
    resources = load("kustomization.yaml")[0]["resources"]
    labels = {name: {each["metadata"]["labels"]["shoal"] for each in manifests()[name]} for name in resources}
    chosen = {"raycluster.yaml": "cluster"} | {name: name.removeprefix("rayjob-")[:-5] for name in JOBS}

    assert sorted(resources) == sorted(set(FILES) - {"kustomization.yaml"})
    assert labels == {name: {chosen.get(name, "setup")} for name in resources}


def test_every_ray_container_notices_a_lost_host():
    """Head and workers have the health-check settings, all of them and with the values that the tests are run with."""
    for container in chain(*(pod["containers"] for pod in pods())):
        variables = {each["name"]: each["value"] for each in container["env"]}
        assert variables | HEALTH == variables


def pods() -> list[dict[str, Any]]:
    """The pods' specs, head first."""
    spec = of_kind("RayCluster")[0]["spec"]
    return [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def test_pods_are_confined():
    """No pod runs as root or can become it, and only the head's autoscaler can speak to the Kubernetes API."""
    head, *workers = pods()
    for pod in (head, *workers):
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
    assert all(worker["automountServiceAccountToken"] is False for worker in workers)


def test_the_cluster_asks_for_a_token():
    """Every call to the dashboard and between nodes needs the token, which Ray knows from 2.52 on."""
    spec = of_kind("RayCluster")[0]["spec"]

    assert spec["authOptions"] == {"mode": "token"}
    assert f"ray=={spec['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()


def test_the_driver_is_alone_on_the_head():
    """The head has no CPU for Ray and is not a spot node: no task or worker runs beside the driver."""
    head = of_kind("RayCluster")[0]["spec"]["headGroupSpec"]

    assert head["rayStartParams"]["num-cpus"] == "0"
    assert head["labels"]["ray.io/market-type"] == "on-demand"
    assert head["template"]["spec"]["nodeSelector"]["karpenter.sh/capacity-type"] == "on-demand"


def test_groups_are_those_of_aws():
    """The same kinds of nodes, labels, priorities and most nodes as cluster/aws.yaml, so that a job's options fit both."""
    types = yaml.safe_load((ROOT / "cluster" / "aws.yaml").read_text())["available_node_types"]
    expected = {
        name: (each["labels"], each["priority"], each["min_workers"], each["max_workers"], each["resources"].get("GPU"))
        for name, each in types.items()
        if name != "head"
    }
    for group in of_kind("RayCluster")[0]["spec"]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        size = pod["containers"][0]["resources"]
        gpus = size["limits"].get("nvidia.com/gpu")
        labels = group["labels"]
        found = (labels, group["priority"], group["minReplicas"], group["maxReplicas"], gpus and int(gpus))
        assert expected.pop(group["groupName"]) == found
        assert size["requests"] == size["limits"]
        assert pod["nodeSelector"]["karpenter.sh/capacity-type"] == labels["ray.io/market-type"]
        kind = labels.get("ray.io/accelerator-type")
        assert pod["nodeSelector"].get("karpenter.k8s.aws/instance-gpu-name") == (kind and kind.lower())
        assert pod["containers"][0]["image"] == ("shoal:cuda" if gpus else "shoal:cpu")
    assert expected == {}


def test_what_pods_name_is_there():
    """Images are targets of the Dockerfile; claims, priority classes and the service account have their manifests."""
    targets = re.findall(r"^FROM \S+ AS (\w+)$", (ROOT / "cluster" / "Dockerfile").read_text(), re.MULTILINE)
    named = {kind: {each["metadata"]["name"] for each in of_kind(kind)} for kind in PLAIN if kind != "Kustomization"}
    for pod in pods():
        mounted = {volume["name"] for volume in pod["volumes"]}
        assert pod["priorityClassName"] in named["PriorityClass"]
        assert pod["serviceAccountName"] in named["ServiceAccount"]
        for volume in pod["volumes"]:
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in named["PersistentVolumeClaim"]
        for container in pod["containers"]:
            name, target = container["image"].split(":")
            assert name == load("kustomization.yaml")[0]["images"][0]["name"]
            assert target in targets
            assert {mount["name"] for mount in container["volumeMounts"]} <= mounted
    values = {each["metadata"]["name"]: each["value"] for each in of_kind("PriorityClass")}
    assert values["shoal-head"] > 0 > values["shoal-worker"]


@pytest.mark.parametrize("name", JOBS)
def test_a_rayjobs_command_is_understood(name):
    """Its entrypoint is a job of jobs/ with options that there are, and its labels are those of a group of nodes."""
    spec = manifests()[name][0]["spec"]
    program, job, words = spec["entrypoint"].split(" ", 2)
    labels = [group["labels"] for group in of_kind("RayCluster")[0]["spec"]["workerGroupSpecs"]]
    asked = dict(word.split("=") for word in parsed(job, words)["worker_label"])

    assert program == "python"
    assert any(asked.items() <= group.items() for group in labels)
    assert yaml.safe_load(spec["runtimeEnvYAML"]).keys() == {"working_dir"}


@pytest.mark.parametrize("name", JOBS)
def test_a_rayjob_may_do_what_it_is_told(name):
    """By cluster/s3-policy.json it reads its inputs, writes its output, and cannot change the code that it runs."""
    spec = manifests()[name][0]["spec"]
    code = yaml.safe_load(spec["runtimeEnvYAML"])["working_dir"]
    output = re.search(r"--output (\S+)", spec["entrypoint"])[1]
    policy = json.loads((ROOT / "cluster" / "s3-policy.json").read_text())["Statement"]

    def may(action: str, url: str) -> bool:
        name = url.replace("s3://", "arn:aws:s3:::")
        return any(
            action in each["Action"] and fnmatch.filter([name], place)
            for each in policy
            for place in ([each["Resource"]] if isinstance(each["Resource"], str) else each["Resource"])
        )

    assert all(may("s3:GetObject", url) for url in [code, *re.findall(r"s3://\S+", spec["entrypoint"])])
    assert may("s3:PutObject", output)
    assert not may("s3:PutObject", code)


@pytest.mark.parametrize("name", JOBS)
def test_a_rayjob_is_tried_again_and_leaves_nothing(name):
    """A failed try is followed by one on a new cluster, each has an end, and the cluster is gone after the last."""
    spec = manifests()[name][0]["spec"]

    assert spec["backoffLimit"] > 0
    assert "clusterSelector" not in spec, "the operator refuses it beside a backoffLimit"
    assert spec["submissionMode"] == "K8sJobMode"
    assert spec["shutdownAfterJobFinishes"] is True
    assert 0 < spec["ttlSecondsAfterFinished"] < spec["activeDeadlineSeconds"]


def test_only_the_cluster_reaches_ray():
    """Into Ray's pods come Ray's pods; into a head's dashboard also submitters and the operator; out no one to metadata."""
    nodes, dashboard = (each["spec"] for each in of_kind("NetworkPolicy"))
    ray = {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    others = [peer["podSelector"]["matchLabels"] for peer in dashboard["ingress"][0]["from"]]
    world = [peer["ipBlock"] for rule in nodes["egress"] for peer in rule.get("to", ()) if "ipBlock" in peer]

    assert nodes["podSelector"] == ray
    assert nodes["policyTypes"] == ["Ingress", "Egress"]
    assert nodes["ingress"] == [{"from": [{"podSelector": ray}]}]
    assert dashboard["podSelector"] == {"matchLabels": {"ray.io/node-type": "head"}}
    assert dashboard["policyTypes"] == ["Ingress"]
    assert [port["port"] for rule in dashboard["ingress"] for port in rule["ports"]] == [8265]
    assert others == [{"ray.io/originated-from-crd": "RayJob"}, {"app.kubernetes.io/name": "kuberay-operator"}]
    assert [block["except"] for block in world] == [["169.254.0.0/16"]]
