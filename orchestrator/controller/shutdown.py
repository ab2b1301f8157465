"""Shutdown of a run: the last records of its members, and removal of everything of it from the cluster."""

import logging
import time
from collections.abc import Callable, Collection, Container
from contextlib import suppress
from functools import partial
from queue import Empty

import ray
from ray.util import placement_group_table

from orchestrator.cluster.actors import find, names_of, remove_group
from orchestrator.cluster.inbox import Arrival, Inbox
from orchestrator.cluster.published.known_runs import forget_taken_over
from orchestrator.cluster.published.published_keys import forget_key
from orchestrator.controller.worker_group import WorkerGroup
from orchestrator.errors import KeyUnknown, ProtocolError, TermSuperseded
from orchestrator.storage.log_file import flush_logs

log = logging.getLogger("orchestrator.control")

LAST_WORDS_S = 2.0  # how long a run that has ended waits for its members' last records
GONE_WITHIN_S = 10.0  # and for its processes to end
LOOK_EVERY_S = 0.02
AGAIN_S = 1.0  # until a removal that failed is tried again
FLUSH_S = 1.0  # for the last lines of the log


def collect_final_records(
    worker_group: WorkerGroup,
    inbox: Inbox,
    members: Collection[str],
    watermark: int,
    take: Callable[[Arrival], None],
) -> None:
    """Collect the steps that members finished since the last request: they count, however the run ended."""
    asked: set[str] = set()
    for member in members:
        if worker_group.ask_records(member, watermark, partial(asked.discard, member)):
            asked.add(member)
    deadline_s = time.monotonic() + LAST_WORDS_S
    while asked and time.monotonic() < deadline_s:
        with suppress(Empty, ProtocolError):  # a late joiner may lack earlier steps, which another member has
            take(inbox.get(timeout=LOOK_EVERY_S))


def remove_groups(run_id: str, num_spawned: int, keep: Container[str] = ()) -> None:
    """Free the workers' reservations, those of an earlier controller included."""
    for worker in (f"w{number}" for number in range(num_spawned)):
        if worker not in keep:
            remove_group(f"{run_id}/worker/{worker}")


def remove_taken_over(run_id: str, error: TermSuperseded | KeyUnknown) -> None:
    """End and remove the workers and services of a run that another cluster has taken over. Steps that they did since
    then were never published. Retries until it succeeds."""
    log.error("run %s: another cluster has taken it over; this one ends its workers and services: %s", run_id, error)
    while True:
        try:
            _remove_all(run_id)
            if rest := _others(run_id):
                raise TimeoutError(f"actors are still alive: {rest}")
            forget_taken_over(run_id, error.message)
            forget_key(run_id)
            return
        except Exception:  # Ray has several for a head that doesn't answer
            log.exception("run %s: not all of it could be removed", run_id)
            time.sleep(AGAIN_S)


def _remove_all(run_id: str) -> None:
    for name in _others(run_id):
        if (handle := find(name)) is not None:
            ray.kill(handle, no_restart=True)
    for group in placement_group_table().values():
        if group["name"].startswith(f"{run_id}/worker/"):
            remove_group(group["name"])
    await_gone(run_id)


def _others(run_id: str) -> list[str]:
    """Names of the run's actors but its controller."""
    return [name for name in names_of(run_id) if name != f"{run_id}/controller"]


def await_gone(run_id: str) -> None:
    """Wait until only the run's controller is left, and log the actors that remain."""
    deadline_s = time.monotonic() + GONE_WITHIN_S
    while (rest := _others(run_id)) and time.monotonic() < deadline_s:
        time.sleep(LOOK_EVERY_S)
    if rest:
        log.error("run %s: actors are still alive: %s", run_id, rest)


def exit_for_good() -> None:
    """End this controller's process, as Ray restarts an actor that merely exits. Another one may have its name by
    now."""
    flush_logs(FLUSH_S)
    ray.kill(ray.get_runtime_context().current_actor, no_restart=True)
