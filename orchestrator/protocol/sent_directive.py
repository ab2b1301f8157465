"""A directive on its way to one worker. The plan of a large world is large, and only changes with the generation: it is
sent until the worker's reports name its digest, and from then on the digest is sent in its place."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Self

from orchestrator.protocol.messages import Directive, GenerationPlan


@dataclass(frozen=True)
class SentDirective:
    """What a worker needs of a directive.

    Args:
        bare: the directive without plans, and without the replay check of another worker.
        current, next: digests of its plans; empty for none.
        plans: those that the worker may not know.
    """

    bare: Directive
    current: str
    next: str
    plans: tuple[GenerationPlan, ...]

    @classmethod
    def of(cls, directive: Directive, worker: str, known: Collection[str]) -> Self:
        """The directive for this worker.

        Args:
            known: digests of the plans that it knows.
        """
        check = directive.check if directive.check is not None and directive.check.worker == worker else None
        bare = replace(directive, current=None, next=None, check=check)
        current, following = ("" if plan is None else plan.digest for plan in (directive.current, directive.next))
        return cls(bare, current, following, tuple(plan for plan in directive.plans if plan.digest not in known))

    def whole(self, known: Iterable[GenerationPlan]) -> Directive | None:
        """The directive with its plans; None if one is neither sent nor among those `known`."""
        plans = {plan.digest: plan for plan in (*known, *self.plans)}
        if not all(digest in plans for digest in (self.current, self.next) if digest):
            return None
        return replace(self.bare, current=plans.get(self.current), next=plans.get(self.next))
