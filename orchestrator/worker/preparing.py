"""Plans that this worker has a place in, prepared in the background while it trains."""

import logging
import threading

from orchestrator.elastic.world import union
from orchestrator.protocol.messages import Directive, GenerationPlan
from orchestrator.worker.desk import Desk
from orchestrator.worker.moving import Prepared, prepare
from orchestrator.worker.shard import Workshop
from orchestrator.worker.vote import NO_FENCE

log = logging.getLogger("orchestrator.worker")


class Preparations:
    """Used by the training thread; connects in threads of its own."""

    def __init__(self, workshop: Workshop, desk: Desk) -> None:
        self._workshop, self._desk = workshop, desk
        self._lock = threading.Lock()
        self._ready: dict[int, Prepared] = {}
        self._begun = -1  # newest generation whose preparation has begun here

    def look(self) -> None:
        """Begin to prepare the next generation if the newest directive names one. Doesn't wait."""
        plan = self._desk.directive.next
        if plan is not None and plan.generation > self._begun and self._concerns_me(plan):
            self._begun = plan.generation
            threading.Thread(target=self._prepare_aside, args=(plan,), name="prepare", daemon=True).start()

    def fence_after(self, step: int) -> int:
        """The generation to which this worker is ready to hand over once `step` is finished, or `NO_FENCE`."""
        fence = self._desk.directive.fence
        if fence is None or (fence.at_step is not None and step < fence.at_step):
            return NO_FENCE
        with self._lock:
            return fence.to_generation if fence.to_generation in self._ready else NO_FENCE

    def take(self, generation: int) -> Prepared:
        """What was prepared for `generation`; whatever else was prepared is closed."""
        with self._lock:
            prepared = self._ready.pop(generation)
            rest, self._ready = list(self._ready.values()), {}
        for other in rest:
            other.close()
        return prepared

    def prepare(self, plan: GenerationPlan) -> Prepared:
        """Prepare now, in the calling thread. Raises RuntimeError if a peer doesn't come."""
        self._begun = plan.generation
        prepared = prepare(self._workshop, plan)
        self._desk.publish(prepared=plan.generation)
        return prepared

    def await_plan(self) -> GenerationPlan:
        """The next plan with a place for this worker that hasn't been tried yet."""
        directive = self._desk.wait(lambda d: self._untried(d) is not None)
        plan = self._untried(directive)
        assert plan is not None
        return plan

    def stands(self, plan: GenerationPlan) -> bool:
        """Whether the newest directive still wants `plan`."""
        directive = self._desk.directive
        wanted = (directive.next, directive.current)
        return any(p is not None and p.generation == plan.generation for p in wanted)

    def await_activation(self, plan: GenerationPlan) -> bool:
        """True once `plan` is activated, False once another plan has come in its place."""
        directive = self._desk.wait(lambda d: d.activated >= plan.generation or self._untried(d) is not None)
        return directive.activated >= plan.generation

    def close(self) -> None:
        with self._lock:
            for prepared in self._ready.values():
                prepared.close()
            self._ready.clear()

    def _untried(self, directive: Directive) -> GenerationPlan | None:
        for plan in (directive.next, directive.current):
            if plan is not None and plan.generation > self._begun and self._concerns_me(plan):
                return plan
        return None

    def _concerns_me(self, plan: GenerationPlan) -> bool:
        return self._workshop.me in union(plan.source, plan.world)

    def _prepare_aside(self, plan: GenerationPlan) -> None:
        try:
            prepared = prepare(self._workshop, plan)
        except RuntimeError as error:
            log.warning("generation %d could not be prepared: %s", plan.generation, error)
            return
        with self._lock:
            self._ready[plan.generation] = prepared
        self._desk.publish(prepared=plan.generation)
