"""The cluster's nodes, as Ray tells of them."""

import os
from typing import Any

import ray

from orchestrator.policy.pools import Labels, pool_of


def labels_of_nodes() -> dict[str, dict[str, str]]:
    """Of every node that is there, by id."""
    return {node["NodeID"]: node["Labels"] for node in _alive()}


def gpus_of_nodes() -> dict[str, float]:
    """How many GPUs every node that is there has, by id."""
    return {node["NodeID"]: node["Resources"].get("GPU", 0.0) for node in _alive()}


def cores_of_nodes(selector: Labels) -> list[int]:
    """Processors of every node that workers with this `label_selector` may live on, as many as Ray was told of. Of a
    cluster of one node, those that its machine has."""
    nodes = _alive()
    if len(nodes) == 1:
        return [os.cpu_count() or 1]
    pool = pool_of(selector, {node["NodeID"]: node["Labels"] for node in nodes})
    return [int(node["Resources"].get("CPU", 0.0)) for node in nodes if node["NodeID"] in pool]


def _alive() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
