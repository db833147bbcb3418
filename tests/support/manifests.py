"""The Kubernetes manifests, read as `kubectl kustomize` makes them, and schemas in which a misspelt key fails."""

import copy
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster" / "kuberay"
SCHEMAS = ROOT.parent / "shared" / "kuberay"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))
JOBS = [name for name in FILES if name.startswith("rayjob-")]
FREE = {"labels", "annotations", "matchLabels", "nodeSelector", "requests", "limits", "rayStartParams"}


def closed(required: str = "", **properties: Any) -> dict[str, Any]:
    """The schema of a mapping with these keys and no others; of the required ones none may be absent."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def several(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": schema, "minItems": 1}


TEXT, WHOLE = {"type": "string"}, {"type": "integer"}
WORDS = {"type": "object", "additionalProperties": TEXT}
META = closed(name=TEXT, labels=WORDS, annotations=WORDS)
HEADER = {"apiVersion": TEXT, "kind": TEXT, "metadata": META | {"required": ["name", "labels"]}}
SELECTOR = closed(matchLabels=WORDS)
PEER = closed(
    podSelector=SELECTOR,
    namespaceSelector=SELECTOR,
    ipBlock=closed("cidr", cidr=TEXT, **{"except": several(TEXT)}),
)
PORTS = several(closed("port protocol", port=WHOLE, protocol={"enum": ["TCP", "UDP"]}))
REPLACEMENT = closed(
    "source targets",
    source=closed("kind name fieldPath", kind=TEXT, name=TEXT, fieldPath=TEXT),
    targets=several(
        closed(
            "select fieldPaths options",
            select=closed("kind", kind=TEXT),
            fieldPaths=several(TEXT),
            options=closed("create", create={"const": True}),
        )
    ),
)
# Of the kinds that are not KubeRay's, the keys that these manifests use.
PLAIN = {
    "Kustomization": closed(
        "apiVersion kind resources replacements images",
        apiVersion={"const": "kustomize.config.k8s.io/v1beta1"},
        kind=TEXT,
        resources=several(TEXT),
        replacements=several(REPLACEMENT),
        images=several(closed("name newName", name=TEXT, newName=TEXT)),
    ),
    "ServiceAccount": closed("apiVersion kind metadata", **HEADER),
    "PriorityClass": closed(
        "apiVersion kind metadata value preemptionPolicy",
        **HEADER,
        value=WHOLE,
        preemptionPolicy={"enum": ["Never", "PreemptLowerPriority"]},
        description=TEXT,
    ),
    "PersistentVolumeClaim": closed(
        "apiVersion kind metadata spec",
        **HEADER,
        spec=closed(
            "accessModes resources",
            accessModes=several({"enum": ["ReadWriteMany"]}),
            storageClassName=TEXT,
            resources=closed("requests", requests=WORDS),
        ),
    ),
    "NetworkPolicy": closed(
        "apiVersion kind metadata spec",
        **HEADER,
        spec=closed(
            "podSelector policyTypes",
            podSelector=SELECTOR,
            policyTypes=several({"enum": ["Ingress", "Egress"]}),
            ingress=several(closed("from", **{"from": several(PEER)}, ports=PORTS)),
            egress=several(closed(to=several(PEER), ports=PORTS)),
        ),
    ),
}


def load(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


@cache
def manifests() -> dict[str, list[dict[str, Any]]]:
    """The documents of each file, the RayJobs with the cluster that kustomize gives them."""
    found = {name: load(name) for name in FILES}
    for name in JOBS:
        found[name][0]["spec"]["rayClusterSpec"] = copy.deepcopy(found["raycluster.yaml"][0]["spec"])
    return found


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [document for document in chain(*manifests().values()) if document["kind"] == kind]


def strict(schema: Any) -> Any:
    """A CRD's schema with every object closed, and numbers allowed where Kubernetes takes them for texts."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if made.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
        made["anyOf"] = [WHOLE, TEXT]
    if made.get("type") == "object" and isinstance(made.get("properties"), dict):
        made.setdefault("additionalProperties", False)
        if made["properties"].get("metadata") == {"type": "object"}:
            made["properties"]["metadata"] = META
    return made


@cache
def validator(kind: str) -> jsonschema.Draft202012Validator:
    """Of a kind of ours, by the list above; of KubeRay's, by the schema that its operator comes with."""
    if kind in PLAIN:
        return jsonschema.Draft202012Validator(PLAIN[kind])
    file = SCHEMAS / f"ray.io_{kind.lower()}s.yaml"
    if not file.exists():
        pytest.skip("KubeRay's schemas are not there")
    definition = yaml.load(file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    version = next(each for each in definition["spec"]["versions"] if each["name"] == "v1")
    return jsonschema.Draft202012Validator(strict(version["schema"]["openAPIV3Schema"]))


def keys(node: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every key that a schema fixes, one of each that differ only in their place in a list."""
    if isinstance(node, dict) and not (path and path[-1] in FREE):
        for key, value in node.items():
            yield (*path, key)
            yield from keys(value, (*path, key))
    if isinstance(node, list):
        for index, value in enumerate(node):
            yield from keys(value, (*path, index))


def misspelt(document: dict[str, Any], path: tuple) -> dict[str, Any]:
    changed = copy.deepcopy(document)
    place = changed
    for step in path[:-1]:
        place = place[step]
    place[path[-1] + "x"] = place.pop(path[-1])
    return changed
