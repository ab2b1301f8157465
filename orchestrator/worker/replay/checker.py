"""Replay of committed steps by a standby, alone, until the run needs it."""

import gc
import logging
from datetime import timedelta

from torch._C._distributed_c10d import HashStore

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.world import World
from orchestrator.protocol.messages import Directive, GenerationPlan, Restore, StoreAddress
from orchestrator.protocol.replay_task import ReplayTask, StepFingerprint
from orchestrator.protocol.worker_report import ReplayResult
from orchestrator.worker.replay.replay import replay
from orchestrator.worker.runtime.mailbox import WorkerMailbox
from orchestrator.worker.shard.shard import ShardFactory
from orchestrator.worker.step.batches import BatchReader
from orchestrator.worker.transition.preparation import TransitionPreparer
from orchestrator.worker.transition.prepared_transition import PreparedTransition

log = logging.getLogger("orchestrator.worker")


class Needed(Exception):
    """The standby has other work to do."""


class ReplayChecker:
    """Runs replay checks in the training thread of a worker without a shard."""

    def __init__(
        self, factory: ShardFactory, feed: BatchReader, mailbox: WorkerMailbox, preparer: TransitionPreparer
    ) -> None:
        self._factory, self._feed, self._mailbox, self._preparer = factory, feed, mailbox, preparer
        self._newest = -1

    def is_asked(self, directive: Directive) -> bool:
        """Whether a check is requested that this worker hasn't begun."""
        check = directive.check
        return check is not None and check.worker == self._factory.me and check.number > self._newest

    def run(self) -> None:
        """Do the requested check and publish its result. It ends before the next micro-batch, or the next piece of the
        checkpoint, once a plan includes this worker or the check is no longer requested."""
        check = self._mailbox.directive.check
        if check is None or not self.is_asked(self._mailbox.directive):
            return
        self._newest = check.number
        findings: list[StepFingerprint] = []
        error = ""

        def go_on() -> None:
            directive = self._mailbox.directive
            if directive.check != check or self._preparer.is_wanted(directive):
                raise Needed

        try:
            for record in replay(self._factory, self._feed, self._world_of_one(check), check.last_step, go_on):
                findings.append(StepFingerprint.of(record))
        except Needed:
            log.info("check %d ends after %d steps: this worker is needed", check.number, len(findings))
        except Exception as failure:  # of any kind: training doesn't depend on it
            log.exception("check %d could not be done", check.number)
            error = f"{type(failure).__name__}: {failure}"
        gc.collect()  # the frames of an error kept the state in memory
        self._mailbox.publish(checked=ReplayResult(check.number, tuple(findings), error))

    def _world_of_one(self, check: ReplayTask) -> PreparedTransition:
        factory = self._factory
        past = check.worlds[-1]
        world = World(past.world.generation, (factory.me,))
        plan = GenerationPlan(
            term=0,
            world=world,
            placement=ExpertPlacement.balanced(past.placement.num_experts, 1),
            source=None,
            store_prefix=f"check/{check.number}",
            store_address=StoreAddress("", 0),
            restore=Restore(check.step, check.path),
            micro_batch=past.micro_batch,
            skips=check.skips,
            replayed=check.worlds,
            families=past.families,
        )
        store = HashStore()
        store.set_timeout(timedelta(seconds=30))
        return PreparedTransition(plan, store, factory.meet(store, plan))
