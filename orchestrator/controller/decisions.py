"""Decisions of a controller: observe, ask `policy.lifecycle` what to do, journal it, then carry it out."""

from orchestrator.controller.observer import Observer
from orchestrator.controller.recorder import StepRecorder
from orchestrator.controller.requests import PendingRequests
from orchestrator.controller.run_checkpoints import RunCheckpoints
from orchestrator.controller.services.rendezvous_client import head_address
from orchestrator.controller.startup import OpenedRun
from orchestrator.controller.worker_group import WorkerGroup
from orchestrator.policy.lifecycle import decide, directive_of
from orchestrator.policy.state.run_state import Commit, KillWorker, Observation, RunState
from orchestrator.protocol.events.base import Event
from orchestrator.storage.tasks import StorageTask


class DecisionMaker:
    """Makes a run's decisions, one at a time, each a storage task."""

    def __init__(
        self,
        run: OpenedRun,
        observer: Observer,
        recorder: StepRecorder,
        checkpoints: RunCheckpoints,
        worker_group: WorkerGroup,
        requests: PendingRequests,
    ) -> None:
        self._limits, self._memory, self._observer = run.limits, run.memory, observer
        self._recorder, self._checkpoints = recorder, checkpoints
        self._worker_group, self._requests = worker_group, requests

    def turn(self) -> StorageTask[None]:
        """Make one decision: journal it first, then carry it out."""
        self._checkpoints.search()
        seen = self._observer.observe()
        decision = decide(self._limits, self._memory.state, seen)
        events = [action for action in decision.actions if isinstance(action, Event)]
        entries = yield from self._memory.decided(decision.state, events)
        for action in decision.actions:
            if isinstance(action, KillWorker):
                self._worker_group.kill(action.worker)
        if decision.state.outcome is None:  # else the loop ends the workers, once their last records are read
            self._direct(decision.state, seen)
        for entry in entries:  # only now, as members may wait for what they are directed to do
            self._recorder.publish(entry)
        self._requests.turned()
        commits = [action for action in decision.actions if isinstance(action, Commit)]
        if not commits:
            self._checkpoints.trouble = None  # what was refused is no longer to be committed
        for commit in commits:
            self._checkpoints.commit(commit)
        if self._checkpoints.trouble or any(report.unsaved is not None for report in seen.reports.values()):
            self._checkpoints.make_room(self._observer.observe)

    def _direct(self, state: RunState, seen: Observation) -> None:
        """Start and end workers as decided, warm the new ones once the data's location is known, direct all."""
        self._worker_group.reconcile(state.worker_group, (*state.failures.quarantine, *seen.draining))
        data = self._memory.data
        if data is not None:
            self._worker_group.warm(data.store_dir, data.vocab_size, head_address())
        self._worker_group.direct(directive_of(state, self._memory.term, journalled=self._memory.progress.watermark))
