"""Background preparation of plans that include this worker, while it trains or stands by."""

import logging
import threading
import time
from collections.abc import Callable

from orchestrator.protocol.messages import Directive, GenerationPlan
from orchestrator.worker.runtime.mailbox import WorkerMailbox
from orchestrator.worker.shard.shard import ShardFactory
from orchestrator.worker.step.vote import NO_FENCE
from orchestrator.worker.transition.prepared_transition import PreparedTransition, prepare

log = logging.getLogger("orchestrator.worker")


class TransitionPreparer:
    """Queried by the training thread; works in threads of its own.

    A plan is begun as soon as a directive names it, however long the present step takes, and in its own thread: the
    next plan doesn't wait where a peer never connects.
    """

    def __init__(self, factory: ShardFactory, mailbox: WorkerMailbox) -> None:
        self._factory, self._mailbox = factory, mailbox
        self._lock = threading.Lock()
        self._ready: dict[int, PreparedTransition] = {}
        self._begun = -1  # newest generation whose preparation has begun here
        self._closed = False
        threading.Thread(target=self._watch, name="preparer", daemon=True).start()

    def fence_after(self, step: int) -> int:
        """The generation to which this worker is ready to hand over once `step` is finished, or `NO_FENCE`."""
        fence = self._mailbox.directive.fence
        if fence is None or (fence.at_step is not None and step < fence.at_step):
            return NO_FENCE
        with self._lock:
            return fence.to_generation if fence.to_generation in self._ready else NO_FENCE

    def take(self, generation: int) -> PreparedTransition:
        """The prepared transition to `generation`. Raises KeyError if there is none."""
        with self._lock:
            return self._ready.pop(generation)

    def is_awaited(self, directive: Directive) -> bool:
        """Whether a plan that includes this worker is prepared."""
        return self._is_ready(directive.next) or self._is_ready(directive.current)

    def is_wanted(self, directive: Directive) -> bool:
        """Whether there is a plan that includes this worker, prepared or not."""
        plans = (plan for plan in (directive.next, directive.current) if plan is not None)
        return any(self._concerns_me(plan) and plan.generation > directive.activated for plan in plans)

    def await_next(self, meanwhile: Callable[[Directive], bool]) -> PreparedTransition | None:
        """The next plan that includes this worker, once it is prepared; plans dropped before are skipped. None as soon
        as a directive asks for work to be done meanwhile."""
        while True:
            directive = self._mailbox.wait(lambda d: self.is_awaited(d) or meanwhile(d))
            if not self.is_awaited(directive) and meanwhile(directive):
                return None
            for plan in (directive.next, directive.current):
                if plan is not None and self._is_ready(plan):
                    return self.take(plan.generation)

    def stands(self, plan: GenerationPlan) -> bool:
        """Whether the newest directive still wants `plan`."""
        return plan.generation in _wanted(self._mailbox.directive)

    def await_activation(self, plan: GenerationPlan) -> int:
        """Wait until the generation of `plan` or a later one is activated, or a newer plan replaces it. Returns the
        newest activated generation."""

        def settled(directive: Directive) -> bool:
            newer = (p for p in (directive.next, directive.current) if p is not None and p.generation > plan.generation)
            return directive.activated >= plan.generation or any(self._concerns_me(p) for p in newer)

        return self._mailbox.wait(settled).activated

    def close(self) -> None:
        """Begin no more preparations and close those that are ready."""
        with self._lock:
            self._closed = True
            rest, self._ready = list(self._ready.values()), {}
        for prepared in rest:
            prepared.close()
        self._mailbox.publish()  # wakes the watcher

    def _watch(self) -> None:
        while not self._closed:
            directive = self._mailbox.wait(lambda d: self._closed or bool(self._untried(d)) or bool(self._given_up(d)))
            with self._lock:
                given_up = [self._ready.pop(generation) for generation in self._given_up(directive)]
            for prepared in given_up:
                prepared.close()
            if not self._closed and (plan := self._untried(directive)) is not None:
                self._begun = plan.generation
                threading.Thread(target=self._prepare, args=(plan,), name="prepare", daemon=True).start()

    def _prepare(self, plan: GenerationPlan) -> None:
        began_s = time.perf_counter()
        try:
            prepared = prepare(self._factory, plan)
        except Exception as error:  # of any kind: the controller waits for a report
            log.warning("generation %d could not be prepared: %s", plan.generation, error)
            self._mailbox.publish(failed_generation=plan.generation)
            return
        log.info("generation %d is prepared, in %.3f s", plan.generation, time.perf_counter() - began_s)
        with self._lock:
            is_late = self._closed
            if not is_late:
                self._ready[plan.generation] = prepared
        if is_late:
            prepared.close()
        else:
            self._mailbox.publish(prepared=plan.generation)

    def _untried(self, directive: Directive) -> GenerationPlan | None:
        for plan in (directive.next, directive.current):
            if plan is not None and plan.generation > self._begun and self._concerns_me(plan):
                return plan
        return None

    def _given_up(self, directive: Directive) -> list[int]:
        """Generations that are ready here but no longer wanted."""
        return [generation for generation in list(self._ready) if generation not in _wanted(directive)]

    def _is_ready(self, plan: GenerationPlan | None) -> bool:
        return plan is not None and plan.generation in self._ready

    def _concerns_me(self, plan: GenerationPlan) -> bool:
        return self._factory.me in plan.involved


def _wanted(directive: Directive) -> set[int]:
    """Generations that a worker may still have to enter, or is in."""
    wanted = {plan.generation for plan in (directive.next, directive.current) if plan is not None}
    return wanted | ({directive.fence.to_generation} if directive.fence is not None else set())
