"""Background thread of the Scheduler: divides the cluster among its runs, sets their sizes, reports draining nodes to
their controllers, and requests resources from Ray's autoscaler.

It holds no state that must survive: its decisions are journalled by the runs' controllers, and its request to Ray's
autoscaler is repeated or withdrawn by its successor.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, Concatenate, ParamSpec

import ray
from ray.autoscaler.sdk import request_resources
from ray.experimental import internal_kv
from ray.util import placement_group_table

from orchestrator.cluster.nodes import draining_nodes, free_on_nodes, labels_of_nodes
from orchestrator.controller.controller import RunController
from orchestrator.errors import OrchestratorError
from orchestrator.policy.cluster.autoscaling import Demand, claim_of, decide_sizes, demand
from orchestrator.policy.cluster.fair_share import divide
from orchestrator.policy.cluster.grants import FairShare, new_grants
from orchestrator.policy.cluster.node_pools import confined
from orchestrator.protocol.scaling import ScalingView
from orchestrator.scheduler.controller_client import ControllerClient, controlled_runs
from orchestrator.scheduler.drain_watch import DrainWatch
from orchestrator.spec.workers import MANUAL

log = logging.getLogger("orchestrator.control")

P = ParamSpec("P")

KV_NAMESPACE = b"orchestrator-demand"
ASKED = b"asked"  # present while Ray's autoscaler has a request of ours
SETTLING_S, EVERY_S, IDLE_S = 0.2, 0.5, 3.0  # between turns: a change is pending, possible, or not up to us
PATIENCE_S = 2.0  # for a controller's answer; a busy one is asked again in the next turn
EXPECTED_S = 30.0  # a run whose controller is silent for this long stops blocking the queue
SUCCESSION_S = 10.0  # how long a new scheduler waits for all controllers' answers before it decides anything


class Autoscaler:
    """Evaluates all runs that have a controller periodically, in its own thread."""

    def __init__(self) -> None:
        self._known: dict[str, ScalingView] = {}  # newest view of each controller
        self._expected: dict[str, ScalingView] = {}  # views of runs whose new controller has not reported yet
        self._since_s: dict[tuple[str, str, int | None], float] = {}  # repeated decisions, since when
        self._began_s = time.monotonic()
        self._demand: tuple[Demand, ...] | None = None
        self._has_failed = False
        self._stirred = threading.Event()
        self._drains = DrainWatch(changed=self.stir)

    def start(self) -> None:
        self._drains.start()
        threading.Thread(target=self._live, name="autoscaler", daemon=True).start()

    def stir(self) -> None:
        """Evaluate now: something has changed."""
        self._stirred.set()

    def share_of(self, newcomer: ScalingView) -> FairShare:
        """The share that a run would get if it were submitted now."""
        runs = self._known | self._expected | {newcomer.run_id: newcomer}
        return _divide(list(runs.values()))[newcomer.run_id]

    def expect(self, newcomer: ScalingView) -> None:
        """Register a run whose controller was just started, so that no later run is admitted before it only because its
        controller reports first. Until the run's own controller reports, no other run makes room for it."""
        self._expected[newcomer.run_id] = newcomer

    def _live(self) -> None:
        pause_s = IDLE_S
        while True:
            self._stirred.wait(pause_s)
            self._stirred.clear()
            try:
                pause_s = self._turn()
                self._has_failed = False
            except Exception:  # the cluster is shutting down, or part of it doesn't answer: the next turn tries again
                pause_s = EVERY_S
                self._since_s = {}
                if not self._has_failed:
                    log.exception("the sizes of runs could not be evaluated")
                self._has_failed = True

    def _turn(self) -> float:
        """Evaluate all runs once. Returns the seconds until the next turn."""
        answered, unknown = self._ask_all()
        if unknown and time.monotonic() - self._began_s < SUCCESSION_S:
            return SETTLING_S
        runs = [self._known[run] for run in sorted(self._known)]
        self._ask_for(demand(runs))
        if not runs:
            self._since_s = {}
            return EVERY_S if self._expected else IDLE_S
        shares = _shares(runs, list(self._expected.values()))
        before, self._since_s = self._since_s, {}
        now_s = time.monotonic()
        for new in new_grants(runs, shares):
            what = ("grant", new.run_id, new.grant.workers)
            is_sure = new.patience_s is None or self._is_sure(before, what, now_s, new.patience_s)
            if is_sure and new.run_id in answered:
                log.info("run %s: %s workers granted: %s", new.run_id, new.grant.workers, new.grant.why)
                _apply(new.run_id, RunController.grant, new.grant)
        for resize in decide_sizes(runs, shares):
            is_sure = self._is_sure(before, ("size", resize.run_id, resize.workers), now_s)
            if is_sure and resize.run_id in answered:
                log.info("run %s: %d workers: %s", resize.run_id, resize.workers, resize.why)
                _apply(resize.run_id, RunController.scale, resize.workers, resize.why, False)
        if self._since_s:
            return SETTLING_S
        is_still = all(run.policy == MANUAL and run.grant.workers is None for run in runs)
        return IDLE_S if is_still and not self._expected else EVERY_S

    def _is_sure(
        self,
        before: Mapping[tuple[str, str, int | None], float],
        what: tuple[str, str, int | None],
        now_s: float,
        patience_s: float = 0.0,
    ) -> bool:
        """Whether this decision has been repeated for at least `patience_s`. Ray reports free resources and placements
        at different moments, so a decision counts only if it is made at least twice."""
        self._since_s[what] = before.get(what, now_s)
        return what in before and now_s - before[what] >= patience_s

    def _ask_for(self, demand: tuple[Demand, ...]) -> None:
        """Send the demand to Ray's autoscaler, which keeps the newest request of any sender for ever: one that isn't
        ours is left alone as long as we have none."""
        if self._demand is None:  # unknown if an earlier scheduler has left a request
            self._demand = None if internal_kv._internal_kv_exists(ASKED, namespace=KV_NAMESPACE) else ()
        if demand == self._demand:
            return
        internal_kv._internal_kv_put(ASKED, b"", overwrite=True, namespace=KV_NAMESPACE)
        bundles, selectors = [dict(place.request) for place in demand], [dict(place.selector) for place in demand]
        request_resources(bundles=bundles, bundle_label_selectors=selectors)
        if not demand:
            internal_kv._internal_kv_del(ASKED, namespace=KV_NAMESPACE)
        self._demand = demand

    def _ask_all(self) -> tuple[set[str], set[str]]:
        """Ask all controllers for views of their runs, and report draining nodes to them. Returns the runs that
        answered, and those of which nothing is known. A run whose controller doesn't answer in time keeps its last
        view."""
        expected = dict(self._expected)
        found = {run: ControllerClient(run).find() for run in controlled_runs()}
        controllers = {run: controller for run, controller in found.items() if controller is not None}
        draining = self._drains.nodes
        calls = {controller.send(RunController.scaling, draining): run for run, controller in controllers.items()}
        answered, _ = ray.wait(list(calls), num_returns=len(calls), timeout=PATIENCE_S) if calls else ([], [])
        views: dict[str, ScalingView | None] = {}
        for call in answered:
            with suppress(ray.exceptions.RayError):  # it is ending, or restarting
                views[calls[call]] = ray.get(call)
        self._forget(expected, views, controllers)
        remembered = {
            run: scale for run, scale in self._known.items() if run in controllers and run not in self._expected
        }
        known = remembered | views
        self._known = {run: scale for run, scale in known.items() if scale is not None}
        reporting = {run for run, scale in views.items() if scale is not None}
        return reporting, set(controllers) - set(known) - set(self._expected)

    def _forget(self, expected: Mapping[str, ScalingView], reported: Collection[str], there: Collection[str]) -> None:
        """Stop expecting runs whose controller has reported, is gone, or is too late."""
        for run, newcomer in expected.items():
            is_late = run in there and run not in reported and time.time() - (newcomer.queued_s or 0.0) > EXPECTED_S
            if is_late:
                log.warning(
                    "run %s: its controller has not reported within %.0f s; it stops blocking the runs behind it",
                    run,
                    EXPECTED_S,
                )
            if (is_late or run in reported or run not in there) and self._expected.get(run) is newcomer:
                del self._expected[run]


def _apply(
    run_id: str, method: Callable[Concatenate[RunController, P], Any], *args: P.args, **kwargs: P.kwargs
) -> None:
    try:
        ControllerClient(run_id, PATIENCE_S).ask(method, *args, **kwargs)
    except (ray.exceptions.RayError, OrchestratorError) as error:  # its state has changed meanwhile
        log.info("run %s did not take the decision: %s", run_id, error)


def _shares(runs: Sequence[ScalingView], expected: Sequence[ScalingView]) -> dict[str, FairShare]:
    """The share of each of `runs`. An expected run only blocks those behind it in the queue."""
    shares = _divide(runs)
    if not expected:
        return shares
    waiting = {run.run_id for run in runs if run.queued_s is not None}
    behind = {run: share for run, share in _divide([*runs, *expected]).items() if run in waiting and not share.places}
    return shares | behind


def _divide(runs: Sequence[ScalingView]) -> dict[str, FairShare]:
    labels = labels_of_nodes()
    staying, runs = set(labels) - set(draining_nodes()), [confined(run, labels) for run in runs]
    claims = {run.run_id: claim_of(run) for run in runs}
    return divide(runs, claims, _homes(staying), free_on_nodes(staying), time.time())


def _homes(nodes: set[str]) -> dict[str, list[str]]:
    """By run, the nodes among these on which its workers are placed, oldest first. Ray reserves places before a worker
    starts."""
    placed: dict[str, list[tuple[int, str]]] = {}
    for group in placement_group_table().values():
        run, is_worker, worker = group["name"].partition("/worker/w")
        for home in group["bundles_to_node_id"].values():
            if is_worker and group["state"] == "CREATED" and home in nodes:
                placed.setdefault(run, []).append((int(worker), home))
    return {run: [home for _, home in sorted(found)] for run, found in placed.items()}
