"""Services of a run besides its workers, one process each: data preparation, rendezvous store, tracker, callbacks.

All start while workers start; those for which nothing waits a little later. Tracker, store and callbacks may fail at
any time and come back, and end while the run waits for room; a service that can't be provided shows as a fault.
"""

import logging
import time
from concurrent.futures import Future
from functools import partial

import ray

from orchestrator.cluster.actors import ActorOptions, find, start_host
from orchestrator.cluster.calls import reason_of
from orchestrator.cluster.inbox import Inbox, post
from orchestrator.cluster.remote import Remote
from orchestrator.cluster.storage_thread import StorageThread
from orchestrator.controller.services.actor_classes import ActorClasses
from orchestrator.controller.services.callbacks_client import NAME as CALLBACKS
from orchestrator.controller.services.callbacks_client import CallbacksClient
from orchestrator.controller.services.rendezvous_client import NAME as STORE
from orchestrator.controller.services.rendezvous_client import RendezvousClient
from orchestrator.controller.services.tracker_client import NAME as TRACKER
from orchestrator.controller.services.tracker_client import TrackerClient
from orchestrator.run_records.prepared_data import PreparationApi, PreparationProgress, PreparedData
from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.location import Location, is_there, location_of
from orchestrator.storage.backends.log_target import LogTarget
from orchestrator.storage.condition import StorageTrouble
from orchestrator.storage.tasks import StorageTask

log = logging.getLogger("orchestrator.control")

PREPARATION = "preparation"
NAMES = (PREPARATION, STORE, TRACKER, CALLBACKS)

LOOK_EVERY_S = 1.0
TRACKER_AFTER_S = 10.0  # by then MLflow shows even a run that is still queued


class RunServices:
    """Starts or finds the services, and keeps their answers."""

    def __init__(
        self,
        run_id: str,
        run_dir: Location,
        job: JobSpec,
        parts: ActorClasses,
        term: int,
        storage: StorageThread,
        inbox: Inbox,
    ) -> None:
        self._run_id, self._run_dir, self._job = run_id, run_dir, job
        self._parts, self._storage, self._inbox = parts, storage, inbox
        self._preparation: Remote[PreparationApi] | None = None  # while it runs
        self._made_s = time.monotonic()
        self.data: PreparedData | None = None
        self.preparing = ""  # progress of data preparation, in words; empty once it is done
        self.trouble: StorageTrouble | None = None  # of storage, for which preparation waits
        self._asked_s = 0.0  # when that progress was last requested
        self._known_data: PreparedData | None = None
        self.tracker = TrackerClient(run_id, run_dir, job, parts.tracker, term, storage, inbox)
        self.callbacks = CallbacksClient(run_id, run_dir, job, parts.callbacks, inbox)
        self.store = RendezvousClient(run_id, run_dir, parts.rendezvous, inbox)
        self._faults: list[str] = []

    @property
    def faults(self) -> tuple[str, ...]:
        return (*self._faults, self.store.fault) if self.store.fault else tuple(self._faults)

    def start(self, data: PreparedData | None) -> StorageTask[None]:
        """Start the services that aren't running. `data`, prepared by an earlier controller, is prepared again if it is
        gone."""
        is_kept = data is not None and (yield partial(self._storage.caller, is_there, location_of(data.store_dir)))
        self._known_data, self.data = data, data if is_kept else None
        if self.data is not None:
            self.tracker.prepared(self.data)
        storage = self._run_dir.parent
        if self.data is None:
            actor_options = ActorOptions(env=self._job.envs, logs=LogTarget(self._run_dir, PREPARATION))
            preparation = start_host(self._name(PREPARATION), self._parts.preparation, (), actor_options)
            self._preparation = preparation.hosted()
            data_dir = str(storage / ".data")
            job_json = self._job.model_dump_json(by_alias=True)
            call = self._preparation.send(PreparationApi.prepare, job_json, str(self._run_dir), data_dir)
            post(self._inbox, call, self._ended)

    def tend(self, now_s: float, has_places: bool, is_queued: bool) -> None:
        """Tend all services, and poll the data's progress at intervals.

        Args:
            has_places: at least one of the run's workers is placed. Until then another run may be making room, which a
                tracker's start would slow.
            is_queued: the run may have no workers now. It has no store then, and no tracker that has nothing to do.
        """
        if is_queued:
            self.store.end()
            self.tracker.rest()
            self.callbacks.end()
        else:
            self.store.tend(now_s)
            if has_places:
                self.callbacks.tend(now_s)
        is_resting = is_queued and self.tracker.is_resting
        if not is_resting and (has_places or now_s - self._made_s >= TRACKER_AFTER_S):
            self.tracker.start()
        self.tracker.tend(now_s)
        if self._preparation is not None and now_s - self._asked_s >= LOOK_EVERY_S:
            self._asked_s = now_s
            post(self._inbox, self._preparation.send(PreparationApi.progress), self._progressed)

    def close(self, outcome: str, why: str, watermark: int) -> None:
        """Let callbacks and tracker finish, then end all services."""
        self.callbacks.close(outcome, why)
        self.tracker.close(outcome, why, watermark)
        for name in NAMES:
            if (handle := find(self._name(name))) is not None:
                ray.kill(handle, no_restart=True)

    def _progressed(self, answer: "Future[PreparationProgress]") -> None:
        if self.data is None and answer.exception() is None:  # else preparation has ended meanwhile
            now = answer.result()
            self.preparing, self.trouble = f"prepares the data: {now.stage}, {now.share:.0%}", now.trouble

    def _ended(self, answer: "Future[PreparedData]") -> None:
        """Note the prepared data, or why there is none."""
        self.trouble = None
        if (error := answer.exception()) is not None:
            self._faults.append(reason_of(error))
            return
        self.preparing = ""
        self._prepared(answer.result())
        if self._preparation is not None:
            self._preparation.kill()
            self._preparation = None

    def _prepared(self, data: PreparedData) -> None:
        known = self._known_data
        if known is None or location_of(known.store_dir).name == location_of(data.store_dir).name:  # named by content
            self.data = data
            self.tracker.prepared(data)
        else:
            self._faults.append(
                "the corpus differs from what the run was trained on, and the token store of the original is gone: "
                f"{known.store_dir}"
            )

    def _name(self, name: str) -> str:
        return f"{self._run_id}/{name}"
