"""The nodes of the cluster: what each has, which labels it bears, and whether an autoscaler adds more."""

from collections.abc import Iterable, Mapping, Sequence
from math import inf
from typing import Any

from ..errors import RunError, UsageError


def live_nodes(labels: Mapping[str, str]) -> Sequence[Mapping[str, float]]:
    """Resources of each live node with these labels."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    return [node["Resources"] for node in alive if all(_has(node["Labels"], *label) for label in labels.items())]


def node_memory(node: str) -> float:
    """Bytes that a node has for workers; infinite where Ray does not know."""
    import ray

    return next((each["Resources"].get("memory", inf) for each in ray.nodes() if each["NodeID"] == node), inf)


def largest_node(labels: Mapping[str, str]) -> float | None:
    """CPUs of the largest node with the labels; None where one of them has a GPU."""
    nodes = live_nodes(labels) or [{}]
    return None if any(node.get("GPU", 0) >= 1 for node in nodes) else max(node.get("CPU", 1) for node in nodes)


def cluster_grows() -> bool:
    """Whether an autoscaler runs, which adds nodes for requests that wait."""
    try:
        from ray.autoscaler.v2.utils import is_autoscaler_v2

        return is_autoscaler_v2(fetch_from_server=True)
    except Exception:  # a private call, whose absence costs only that a cluster of no nodes is refused
        return False


def parse_labels(words: Iterable[str]) -> dict[str, str]:
    """`key=value` words; a value may be an operator of Ray's label selectors: `!spot`, `in(L4,A10G)`. Raises UsageError."""
    pairs = [word.partition("=") for word in words]
    for key, _, value in pairs:
        if not key or not value:
            raise UsageError(f"--worker-label {key!r} is not KEY=VALUE, as in ray.io/accelerator-type=L4")
    if len({key for key, *_ in pairs}) < len(pairs):
        raise UsageError("--worker-label names a label twice. Write its values as in(L4,A10G)")
    return {key: value for key, _, value in pairs}


def check_labels(labels: Mapping[str, str], nodes: Sequence[Mapping[str, float]]) -> None:
    """Raises RunError where labels are wanted and none of the nodes has them. nodes: those with the labels."""
    if labels and not nodes:
        import ray

        known = sorted({f"{k}={v}" for node in ray.nodes() for k, v in node["Labels"].items() if k != "ray.io/node-id"})
        wanted = " ".join(f"{key}={value}" for key, value in labels.items())
        raise RunError(f"no node has the labels {wanted}. There are {', '.join(known) or 'none'}: choose from these")


def describe_nodes(nodes: Iterable[Mapping[str, Any]]) -> str:
    """The different kinds of node, in words."""
    kinds = set()
    for node in nodes:
        gpu = f", {node['GPU']:g} GPU" if node.get("GPU") else ""
        kinds.add(f"{node.get('CPU', 0):g} CPU{gpu}, {node.get('memory', 0) / 2**30:.1f} GiB")
    return "; ".join(sorted(kinds))


def _has(labels: Mapping[str, str], key: str, wanted: str) -> bool:
    value = wanted.removeprefix("!")
    values = [one.strip() for one in value[3:-1].split(",")] if value.startswith("in(") else [value]
    return (labels.get(key) in values) != wanted.startswith("!")
