"""Training state as named ranges: the only form in which an engine exposes its state.

Tensors are those of `orchestrator.elastic.state_spec`; a range is a run of a tensor's elements, in the order of the
flattened tensor, lying in this process's memory. The tensors are views: writing to them writes the engine's state.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.elastic.state_spec import changes_in_forward


@dataclass(frozen=True)
class Range:
    """Elements [start, stop) of a named tensor; `data` is flat and contiguous, stop - start long."""

    start: int
    stop: int
    data: Tensor

    def __post_init__(self) -> None:
        if self.data.dim() != 1 or self.data.numel() != self.stop - self.start:
            raise ValueError(f"range [{self.start}, {self.stop}) with data of shape {tuple(self.data.shape)}")


class NamedRanges:
    """The ranges that this process holds, by tensor name, ascending and disjoint within a tensor."""

    def __init__(self) -> None:
        self._ranges: dict[str, list[Range]] = {}

    def add(self, name: str, start: int, data: Tensor) -> None:
        """Add `data` (flat, contiguous) as elements [start, start + numel) of `name`. Empty data is left out."""
        if data.numel():
            ranges = self._ranges.setdefault(name, [])
            ranges.append(Range(start, start + data.numel(), data))
            ranges.sort(key=lambda r: r.start)

    def view(self, name: str, start: int, stop: int) -> Tensor:
        """A view of elements [start, stop) of `name`.

        Raises:
            KeyError: this process does not hold all of them in one range.
        """
        for held in self._ranges.get(name, ()):
            if held.start <= start and stop <= held.stop:
                return held.data[start - held.start : stop - held.start]
        raise KeyError(f"{name}[{start}:{stop}] is not held here; held: {self.spans(name)}")

    def spans(self, name: str) -> list[tuple[int, int]]:
        return [(r.start, r.stop) for r in self._ranges.get(name, ())]

    def names(self) -> list[str]:
        return list(self._ranges)

    def __iter__(self) -> Iterator[tuple[str, Range]]:
        for name, ranges in self._ranges.items():
            for held in ranges:
                yield name, held

    def num_bytes(self) -> int:
        return sum(held.data.numel() * held.data.element_size() for _, held in self)

    def detached(self) -> "NamedRanges":
        """The same memory under new views, so that the engine that made the old ones can be freed."""
        copy = NamedRanges()
        for name, held in self:
            copy.add(name, held.start, held.data.detach())
        return copy

    def until_update(self) -> "NamedRanges":
        """As `detached`, for a thread that reads them beside the forward passes of the next step: what those may write
        to is copied."""
        copy = NamedRanges()
        for name, held in self:
            data = held.data.detach()
            copy.add(name, held.start, data.clone() if changes_in_forward(name) else data)
        return copy


def zeros_like(ranges: NamedRanges) -> NamedRanges:
    """Fresh zeroed memory of the same ranges."""
    copy = NamedRanges()
    for name, held in ranges:
        copy.add(name, held.start, torch.zeros_like(held.data))
    return copy
