"""Nodes of the cluster, as Ray reports them."""

import os
from typing import Any

import ray
from ray.autoscaler.v2.sdk import get_cluster_status

from orchestrator.policy.cluster.bin_packing import Resources
from orchestrator.policy.cluster.capacity import DEVICES
from orchestrator.policy.cluster.node_pools import Labels, matches, pool_of


def labels_of_nodes() -> dict[str, dict[str, str]]:
    """Labels of every living node, by id."""
    return {node["NodeID"]: node["Labels"] for node in _alive()}


def gpus_of_nodes() -> dict[str, float]:
    """Number of GPUs of every living node, by id."""
    return {node["NodeID"]: node["Resources"].get("GPU", 0.0) for node in _alive()}


def cores_of_nodes(selector: Labels) -> list[int]:
    """Processors of every node that workers with this `label_selector` may run on, as declared to Ray. In a cluster of
    one node, the processors of its machine."""
    nodes = _alive()
    if len(nodes) == 1:
        return [os.cpu_count() or 1]
    pool = pool_of(selector, {node["NodeID"]: node["Labels"] for node in nodes})
    return [int(node["Resources"].get("CPU", 0.0)) for node in nodes if node["NodeID"] in pool]


def draining_nodes() -> dict[str, float]:
    """Deadlines of living nodes that are draining, by id, in `time.time()` seconds; 0 for none."""
    nodes: dict[str, int] = ray._private.state.state.get_draining_nodes()
    return {node: deadline_ms / 1000.0 for node, deadline_ms in nodes.items()}


def free_on_nodes(nodes: set[str] | None = None) -> dict[str, Resources]:
    """Free resources of each node, or of those among `nodes`, and its number of GPUs as `DEVICES`."""
    free: dict[str, Resources] = ray._private.state.available_resources_per_node()  # type: ignore[no-untyped-call]
    gpus = gpus_of_nodes()
    chosen = {node: amounts for node, amounts in free.items() if nodes is None or node in nodes}
    return {node: {**amounts, DEVICES: gpus.get(node, 0.0)} for node, amounts in chosen.items()}


def whole_nodes(selector: Labels) -> list[Resources]:
    """Total resources of each node whose labels match: what would be free if nothing ran there."""
    return [node["Resources"] for node in _alive() if matches(node["Labels"], selector)]


def may_grow() -> bool:
    """Whether an autoscaler may add nodes. Without one, Ray names a node's type after the node."""
    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    nodes = (*status.active_nodes, *status.idle_nodes, *status.pending_nodes)
    return any(node.ray_node_type_name != f"node_{node.node_id}" for node in nodes)


def _alive() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
