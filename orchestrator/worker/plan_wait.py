"""Waits of a worker without a generation in training: for a plan that includes it, for a fence, for activation."""

import logging

from orchestrator.protocol.messages import Directive, GenerationPlan
from orchestrator.worker.replay.checker import ReplayChecker
from orchestrator.worker.runtime.mailbox import WorkerMailbox
from orchestrator.worker.step.position import RunPosition
from orchestrator.worker.transition.fence import announced
from orchestrator.worker.transition.preparation import TransitionPreparer
from orchestrator.worker.transition.prepared_transition import PreparedTransition
from orchestrator.worker.transition.snapshots import SnapshotManager

log = logging.getLogger("orchestrator.worker")

POLL_S = 0.25  # how often a waiting newcomer checks whether its plan is still wanted


class PlanWaiter:
    """Used by the training thread.

    Args:
        checker: replays steps meanwhile.
        snapshots: hold the states that a plan after a failure may need.
    """

    def __init__(
        self,
        me: str,
        mailbox: WorkerMailbox,
        preparer: TransitionPreparer,
        position: RunPosition,
        checker: ReplayChecker,
        snapshots: SnapshotManager,
    ) -> None:
        self._me, self._mailbox, self._preparer, self._position = me, mailbox, preparer, position
        self._checker, self._snapshots = checker, snapshots
        self._replayed = -1  # newest generation whose source's snapshots have been made whole here

    def await_transition(self, may_replay: bool) -> PreparedTransition:
        """Wait until a plan includes this worker and its transition can begin.

        Args:
            may_replay: this worker holds no state that takes memory beside a replay check's.
        """

        def is_asked(directive: Directive) -> bool:
            return self._to_replay(directive) is not None or (may_replay and self._checker.is_asked(directive))

        while True:
            prepared = self._preparer.await_next(meanwhile=is_asked)
            if prepared is None:
                if (plan := self._to_replay(self._mailbox.directive)) is not None:
                    self._replay(plan)
                else:
                    self._checker.run()
                continue
            source = prepared.plan.source
            if source is None or self._me in source.holders or self._await_fence(prepared):
                return prepared
            prepared.close()

    def await_activation(self, plan: GenerationPlan) -> int:
        """Wait until the generation of `plan` or a later one is activated, or a newer plan replaces it. Returns the
        newest activated generation."""
        return self._preparer.await_activation(plan)

    def close(self) -> None:
        """Drop the prepared transitions."""
        self._preparer.close()

    def _to_replay(self, directive: Directive) -> GenerationPlan | None:
        """A plan after a failure for which this worker may have to replay deltas of snapshots."""
        began = max(directive.activated, self._replayed)
        for plan in (directive.next, directive.current):
            source = None if plan is None or plan.generation <= began else plan.source
            if source is not None and source.step is not None and self._me in source.holders:
                return plan
        return None

    def _replay(self, plan: GenerationPlan) -> None:
        """Replay them now, while other threads connect: in the transition the other workers would wait for it. An error
        is left to the transition, which tries again and can be abandoned."""
        assert plan.source is not None
        self._replayed = plan.generation
        try:
            self._snapshots.make_whole(plan.source)
        except Exception as error:
            log.warning("deltas for generation %d could not be replayed: %s", plan.generation, error)
        self._mailbox.publish(holdings=self._snapshots.holdings)

    def _await_fence(self, prepared: PreparedTransition) -> bool:
        """Wait until the old world has reached its fence. False if the plan is dropped first, or its rendezvous store
        fails."""
        plan = prepared.plan
        try:
            while (standing := announced(prepared, POLL_S)) is None:
                if not self._preparer.stands(plan):
                    return False
        except RuntimeError as error:
            log.warning("generation %d can't be reached, its rendezvous store is gone: %s", plan.generation, error)
            self._mailbox.publish(failed_generation=plan.generation)
            return False
        self._position.follow(standing.progress)
        self._mailbox.go_back_to(standing.progress.step, standing.records)
        return True
