"""Gradients of weights that are accumulated outside of autograd, which then gets none."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class GradientSink(Protocol):
    """Accumulates one parameter's gradient: its attribute `gradient_sink` (`orchestrator.comm.gradients.buckets`)."""

    def add(self, grad: Tensor) -> None:
        """Add a part of the gradient."""

    def add_product(self, left: Tensor, right: Tensor) -> None:
        """Add a part of the gradient, given as two matrices whose product it is."""


def sinks_of(weights: Sequence[Tensor]) -> list[GradientSink | None]:
    """The sink of each weight; None where autograd takes its gradient."""
    return [getattr(weight, "gradient_sink", None) for weight in weights]
