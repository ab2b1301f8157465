"""The part of the Scheduler that runs by itself: how many workers runs are to have, and for how many Ray has to care.

It keeps nothing that matters: what it decides is journalled by the run's controller, and what it has asked of Ray's
autoscaler is asked again by its successor, or taken back.
"""

import logging
import threading
import time
from contextlib import suppress

import ray
from ray.autoscaler.sdk import request_resources
from ray.experimental import internal_kv
from ray.util import placement_group_table

from orchestrator.control.drain_watch import draining_nodes
from orchestrator.control.host import NAMESPACE, find
from orchestrator.control.nodes import gpus_of_nodes, labels_of_nodes
from orchestrator.errors import OrchestratorError
from orchestrator.policy.autoscaling import Demand, Resize, Resources, decide_sizes, demand
from orchestrator.policy.capacity import DEVICES
from orchestrator.policy.pools import confined
from orchestrator.protocol.scaling import RunScale
from orchestrator.spec.autoscale import MANUAL

log = logging.getLogger("orchestrator.control")

KV_NAMESPACE = b"orchestrator-demand"
ASKED = b"asked"  # there while Ray's autoscaler has a request of ours
EVERY_S, IDLE_S = 0.5, 3.0  # between two looks, and where no run leaves its size to us
PATIENCE_S = 2.0  # for a controller's answer; one that is busy is heard the next time


class Autoscaler:
    """Looks at all runs that have a controller again and again, in a thread of its own."""

    def __init__(self) -> None:
        self._known: dict[str, RunScale] = {}  # what each controller said last
        self._since_s: dict[tuple[str, int], float] = {}  # what is decided again and again, since when
        self._demand: tuple[Demand, ...] | None = None
        self._has_failed = False

    def start(self) -> None:
        threading.Thread(target=self._live, name="autoscaler", daemon=True).start()

    def _live(self) -> None:
        while True:
            try:
                has_work = self._turn()
                self._has_failed = False
            except Exception:  # the cluster is going away, or something of it doesn't answer: the next turn tries again
                has_work = True
                self._since_s = {}
                if not self._has_failed:
                    log.exception("the sizes of runs could not be looked at")
                self._has_failed = True
            time.sleep(EVERY_S if has_work else IDLE_S)

    def _turn(self) -> bool:
        """Returns whether any run leaves its size to us."""
        answered = self._ask_all()
        labels = labels_of_nodes()
        runs = [confined(self._known[run], labels) for run in sorted(self._known)]
        self._ask_for(demand(runs))
        if all(run.policy == MANUAL for run in runs):
            self._since_s = {}
            return False
        staying = set(labels) - set(draining_nodes())
        decided = decide_sizes(runs, _placed(staying), free_on_nodes(staying))
        now_s = time.monotonic()
        # What is free and what is placed aren't told at one moment: only what is seen twice, at least, is so.
        before, self._since_s = self._since_s, {}
        for resize in decided:
            what = (resize.run_id, resize.workers)
            self._since_s[what] = before.get(what, now_s)
            is_sure = what in before and now_s - before[what] >= resize.patience_s
            if is_sure and resize.run_id in answered:
                self._wish(resize)
        return True

    def _ask_for(self, demand: tuple[Demand, ...]) -> None:
        """Tell Ray's autoscaler, which keeps the newest request for ever, whoever made it: one that isn't ours is left
        alone as long as we have none."""
        if self._demand is None:  # ours, or that of a scheduler before us
            self._demand = None if internal_kv._internal_kv_exists(ASKED, namespace=KV_NAMESPACE) else ()
        if demand == self._demand:
            return
        internal_kv._internal_kv_put(ASKED, b"", overwrite=True, namespace=KV_NAMESPACE)
        bundles, selectors = [dict(place.request) for place in demand], [dict(place.selector) for place in demand]
        request_resources(bundles=bundles, bundle_label_selectors=selectors)
        if not demand:
            internal_kv._internal_kv_del(ASKED, namespace=KV_NAMESPACE)
        self._demand = demand

    def _ask_all(self) -> set[str]:
        """Hear what controllers say of their runs; who they are. A run whose controller doesn't answer just now is
        remembered as it was."""
        handles = {run: handle for run in _controlled() if (handle := find(f"{run}/controller")) is not None}
        calls = {handle.scaling.remote(): run for run, handle in handles.items()}
        answered, _ = ray.wait(list(calls), num_returns=len(calls), timeout=PATIENCE_S) if calls else ([], [])
        heard: dict[str, RunScale | None] = {}
        for call in answered:
            with suppress(ray.exceptions.RayError):  # it ends, or comes back
                heard[calls[call]] = ray.get(call)
        known = {run: heard.get(run, self._known.get(run)) for run in handles}
        self._known = {run: scale for run, scale in known.items() if scale is not None}
        return {run for run, scale in heard.items() if scale is not None}

    def _wish(self, resize: Resize) -> None:
        log.info("run %s: %d workers: %s", resize.run_id, resize.workers, resize.why)
        handle = find(f"{resize.run_id}/controller")
        if handle is None:
            return
        try:
            ray.get(handle.scale.remote(resize.workers, resize.why, False), timeout=PATIENCE_S)
        except (ray.exceptions.RayError, OrchestratorError, TimeoutError) as error:  # its state has changed meanwhile
            log.info("run %s was not asked: %s", resize.run_id, error)


def _controlled() -> list[str]:
    """Runs that have a controller."""
    actors: list[dict[str, str]] = ray.util.list_named_actors(all_namespaces=True)
    names = [actor["name"] for actor in actors if actor["namespace"] == NAMESPACE]
    return [name.removesuffix("/controller") for name in names if name.endswith("/controller")]


def free_on_nodes(nodes: set[str] | None = None) -> dict[str, Resources]:
    """What is free on each node, or on those among `nodes`, and how many GPUs it has."""
    free: dict[str, Resources] = ray._private.state.available_resources_per_node()  # type: ignore[no-untyped-call]
    gpus = gpus_of_nodes()
    chosen = {node: amounts for node, amounts in free.items() if nodes is None or node in nodes}
    return {node: {**amounts, DEVICES: gpus.get(node, 0.0)} for node, amounts in chosen.items()}


def _placed(nodes: set[str]) -> dict[str, int]:
    """How many workers of each run have a place on one of these nodes; Ray reserves it before the worker starts."""
    placed: dict[str, int] = {}
    for group in placement_group_table().values():
        run, is_worker, _ = group["name"].partition("/worker/")
        homes = group["bundles_to_node_id"].values()
        if is_worker and group["state"] == "CREATED" and nodes.issuperset(homes):
            placed[run] = placed.get(run, 0) + 1
    return placed
