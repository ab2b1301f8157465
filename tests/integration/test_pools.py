"""A cluster whose nodes have labels, on real Ray with simulated workers: runs stay in their pools."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util import placement_group_table
from ray.util.placement_group import placement_group, remove_placement_group

from orchestrator.cluster.actors import find, names_of
from orchestrator.cluster.calls import ask
from orchestrator.cluster.nodes import labels_of_nodes
from orchestrator.errors import JobDoesNotFit
from orchestrator.policy.cluster.node_pools import matches
from orchestrator.protocol.status import RunPhase
from orchestrator.spec.keys.labels import NODE_ID
from tests.support.control import Cluster, another_node, drain, local_ray
from tests.support.worker_processes import pid_of_actor

pytestmark = [pytest.mark.ray, pytest.mark.journey]

SOON_S = 60.0


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A head with a processor, and two nodes with labels."""
    with local_ray(num_cpus=1), another_node(3, pool="a", zone="east"), another_node(2, pool="b"):
        yield


@pytest.fixture
def on(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def _job(selector: dict[str, str], **changes: Any) -> dict[str, Any]:
    return {
        "workers": {"min": 1, "max": 4, "initial": 1, "label_selector": selector},
        "resources": {"cpus": 1},
        "train": {"max_steps": 100_000, "global_batch_size": 16, "micro_batch_size": 4},
        **changes,
    }


def _pools(name: str) -> list[str | None]:
    """Of the nodes that the run's workers live on."""
    workers = [find(actor) for actor in names_of(name) if actor.startswith(f"{name}/worker/")]
    labels = labels_of_nodes()
    return [labels[ask(worker, "node", timeout_s=SOON_S)].get("pool") for worker in workers]


def test_a_selector_selects_the_same_nodes_in_ray() -> None:
    texts = ("a", "!a", "in(a,b)", "!in(a,b)", "x", "!x")
    labels = labels_of_nodes()
    asked = [({key: text, NODE_ID: node}, node) for key in ("pool", "zone") for text in texts for node in labels]
    groups = [
        (placement_group([{"CPU": 0.01}], bundle_label_selector=[selector]), selector, node) for selector, node in asked
    ]
    for group, selector, node in groups:
        if matches(labels[node], selector):
            ray.get(group.ready(), timeout=SOON_S)
    last = placement_group([{"CPU": 0.01}])  # by then Ray has looked at the others
    ray.get(last.ready(), timeout=SOON_S)
    placed = [placement_group_table(group)["state"] == "CREATED" for group, _, _ in groups]
    assert placed == [matches(labels[node], selector) for _, selector, node in groups]
    for group in (last, *(group for group, _, _ in groups)):
        remove_placement_group(group)


def test_a_run_uses_its_pool_and_no_more(on: Cluster) -> None:
    on.submit("pooled", **_job({"pool": "a"}, autoscale={"policy": "available", "cooldown_s": 0}))
    on.until("pooled", lambda s: s.workers_now == 3)  # of six processors that are free
    assert _pools("pooled") == ["a"] * 3
    on.ask("kill_worker", "pooled")
    on.until("pooled", lambda s: bool(s.recoveries) and s.workers_now == 3)
    assert _pools("pooled") == ["a"] * 3
    with pytest.raises(JobDoesNotFit, match=r"there is no room for 3 workers; free are 0 CPU, [^;,]* memory\."):
        on.submit("second", **_job({}, workers={"min": 3, "label_selector": {"zone": "in(east,west)"}}))
    with pytest.raises(JobDoesNotFit, match=r"room for 2 if nothing else runs: its nodes of \{pool: b\} have 2 CPU"):
        on.submit("second", **_job({}, workers={"min": 3, "label_selector": {"pool": "b"}}))
    on.submit("elsewhere", **_job({"pool": "!a"}, workers={"min": 3, "label_selector": {"pool": "!a"}}))
    on.until("elsewhere", lambda s: s.workers_now == 3)
    assert sorted(map(str, _pools("elsewhere"))) == ["None", "b", "b"]
    for name in ("pooled", "elsewhere"):
        on.ask("stop", name)
        assert on.end_of(name).phase is RunPhase.STOPPED


def test_a_missing_node_pool_is_an_immediate_error(on: Cluster) -> None:
    with pytest.raises(JobDoesNotFit) as told:
        on.submit("early", wait=True, **_job({"pool": "c"}))
    assert "{pool: c} fits none of the cluster's 3 nodes; labels there are: pool: a, b; zone: east" in str(told.value)
    assert not names_of("early") and not (on.storage / "early").exists()
    with another_node(1, pool="c"):
        on.submit("early", **_job({"pool": "c"}))
        on.until("early", lambda s: s.step > 0)
        assert _pools("early") == ["c"]
        on.ask("stop", "early")
        on.end_of("early")


def test_every_controller_gets_drained_nodes_a_restarted_one_too(on: Cluster) -> None:
    with another_node(2, pool="d"):
        for name in ("first", "second"):
            on.submit(name, wait=True, **_job({"pool": "d"}))
            on.until(name, lambda s: s.step > 0)
        (node,) = (node for node, labels in labels_of_nodes().items() if labels.get("pool") == "d")
        controller = pid_of_actor("ray::controller first")
        os.kill(controller, signal.SIGSTOP)  # it sees nothing of it before it is restarted
        drain(node)
        on.until("second", lambda _: "node_draining" in on.kinds("second"))
        os.kill(controller, signal.SIGKILL)
        on.until("first", lambda _: "node_draining" in on.kinds("first"))
        for name in ("first", "second"):
            on.ask("stop", name)
            assert on.end_of(name).phase is RunPhase.STOPPED
