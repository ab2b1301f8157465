"""The training loop's interface to an engine. Two exist: DeepSpeed's, and a plain-torch reference, the oracle."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from orchestrator.model.moe.routing.balance import RoutingCounts
from orchestrator.model.task import Batch, Loss
from orchestrator.state.ranges import NamedRanges


@dataclass(frozen=True)
class StepOutcome:
    """Result of an optimizer step.

    Args:
        applied: False when the gradients were not finite; then no rank changed anything.
        grad_norm: global norm before clipping; inf when not applied.
        gradients: if requested and applied: `grad/NAME`, fp32, clipped, of the elements that this rank updates.
        saturated: parameters whose gradient was too large here for an exact sum; then no rank applies the update.
        sparsity: share of the weights of pruned parameters, of all ranks, that are zero after it.
    """

    applied: bool
    grad_norm: float
    gradients: NamedRanges | None = None
    saturated: tuple[str, ...] = ()
    sparsity: float = 0.0


def noop() -> None:
    """Do nothing: the default callback."""


class Engine(Protocol):
    """Trains one rank's shard within one generation."""

    def accumulate(
        self,
        micro_batch: Batch,
        global_units: int,
        last: bool,
        before_backward: Callable[[], None] = noop,
        scale: int | None = None,
    ) -> tuple[Loss, RoutingCounts]:
        """Forward and backward of one micro-batch. Accumulates the gradient of its loss sum / `global_units`.

        Every rank calls it equally often per step; a rank without a micro-batch passes one with no rows.

        Args:
            last: `step` comes next: gradients may be sent during this backward pass.
            before_backward: called between the two.
            scale: units to which auxiliary losses, sums over tokens, are scaled; None: as many as there are tokens.

        Returns:
            the micro-batch's loss, detached, and its routers' counts.
        """
        ...

    def step(self, lr: float, before_update: Callable[[], None] = noop, keep_gradients: bool = False) -> StepOutcome:
        """Sum gradients over the ranks, clip, update.

        Args:
            before_update: called once, when everything is known and the state is about to change; not if the update is
                skipped. If anything is raised before it is called, the state is that of the step before.
            keep_gradients: return the gradients; they live as long as they are referenced.
        """
        ...

    def evaluate(self, micro_batch: Batch) -> Loss:
        """Loss of a micro-batch, no gradient. Every rank calls it equally often."""
        ...

    def ranges(self) -> NamedRanges:
        """All state of this rank, as views."""
        ...

    def idle_state(self) -> NamedRanges:
        """All memory that is constant between two updates, as views: `ranges`, and copies derived from it."""
        ...

    def on_weights_initialized(self) -> None:
        """Called after the model's weights were drawn from the seed: masters become copies of them, moments zero."""
        ...

    def on_state_loaded(self, num_updates: int) -> None:
        """Recompute derived copies after `ranges()` was written. `num_updates`: optimizer steps applied so far."""
        ...

    def close(self) -> None:
        """Release hooks and groups. Ranges returned before stay readable."""
        ...
