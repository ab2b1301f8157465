"""The state of a model with other experts: which elements of the old state each new tensor consists of. Pure.

A transition that changes the number of experts first gives the old world's state, where it lies, the names and places
that it has in the new model (`relabelled`). Transfer plans and digests then work as in any other transition.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from orchestrator.elastic.expert_change import ExpertChange, of_layer
from orchestrator.elastic.state_layout import IntArray, StateLayout
from orchestrator.elastic.state_spec import FACTORS, Inventory, Sharing, StateTensor, expert_of

Piece = tuple[int, int, str, int]  # elements [start, stop) of a new tensor, the old tensor, and its first element


@dataclass(frozen=True, eq=False)
class StateMap:
    """The elements of a new state, each as an element of the old one.

    Args:
        old, new: tensors of the two states, which have the same names but for those of experts.
        layers: names of the MoE layers, as the names of their experts' parameters begin.
        change: with the old expert that each new one comes from.

    Raises:
        ValueError: a tensor whose shape doesn't follow from the number of experts.
    """

    old: Inventory
    new: Inventory
    layers: Sequence[str]
    change: ExpertChange

    @cached_property
    def pieces(self) -> Mapping[str, tuple[Piece, ...]]:
        """By new tensor, in its order; an unchanged one is one piece."""
        return {name: tuple(self._pieces(tensor)) for name, tensor in self.new.items()}

    @cached_property
    def _number(self) -> Mapping[str, int]:
        return {layer: index for index, layer in enumerate(self.layers)}

    def sources_of(self, name: str) -> tuple[int, ...]:
        """The sources of the experts of the layer that a tensor is of; empty if it is of none."""
        layer = _layer(name, self._number)
        return of_layer(self.change.sources, self._number[layer]) if layer else ()

    def _pieces(self, tensor: StateTensor) -> Iterator[Piece]:
        sources = self.sources_of(tensor.name)
        if sources and (expert := expert_of(tensor.name)) is not None:
            yield 0, tensor.numel, tensor.name.replace(f".experts.{expert}.", f".experts.{sources[expert]}."), 0
            return
        before = self.old[tensor.name]
        if before.shape == tensor.shape:
            yield 0, tensor.numel, tensor.name, 0
            return
        yield from _rows(tensor, before, sources, self.change.num_before)

    def source_of(self, name: str) -> str:
        """The old tensor that a new one consists of."""
        return self.pieces[name][0][2]

    def within(self, name: str, start: int, stop: int) -> Iterator[Piece]:
        """The pieces of elements [start, stop) of a new tensor."""
        for begin, end, old, first in self.pieces[name]:
            low, high = max(begin, start), min(end, stop)
            if low < high:
                yield low, high, old, first + low - begin

    def relabelled(self, layout: StateLayout) -> StateLayout:
        """The layout of the old state under the new names: each element is where the one is that it comes from."""
        old_number = {name: index for index, name in enumerate(layout.names)}
        rows = [
            (new, start, stop, old_number[old], first)
            for new, name in enumerate(self.new)
            for start, stop, old, first in self.pieces[name]
        ]
        table = np.array(rows, dtype=np.int64).reshape(-1, 5)
        holder_set = layout.holder_set[[old_number[self.source_of(name)] for name in self.new]]
        is_sharded = np.array([tensor.sharing is Sharing.SHARDED for tensor in self.new.values()], dtype=np.bool_)
        shards = _cut_alike(table[is_sharded[table[:, 0]]], layout)
        return replace(layout, tensors=self.new, holder_set=holder_set, shards=shards)


def _layer(name: str, number: Mapping[str, int]) -> str:
    """The MoE layer that a tensor of the state, `KIND/LAYER.…`, is of; empty for none."""
    plain = name.partition("/")[2]
    while plain and plain not in number:
        plain = plain.rpartition(".")[0]
    return plain


def _rows(tensor: StateTensor, before: StateTensor, sources: Sequence[int], num_before: int) -> Iterator[Piece]:
    """Rows by expert, of one or several heads each of which has all experts, and what follows them unchanged."""
    num_rows, old_rows, width, tail = tensor.shape[0], before.shape[0], tensor.numel // tensor.shape[0], 0
    if tensor.name.startswith(f"{FACTORS}/") and tensor.like is not None:  # by row, then by column
        num_rows, width = tensor.like.rows, 1
        tail = tensor.numel - num_rows
        old_rows = before.numel - tail
    heads = num_rows // len(sources) if sources else 0
    if not heads or heads * len(sources) != num_rows or heads * num_before != old_rows:
        raise ValueError(
            f"{tensor.name} of shape {before.shape} can't be mapped to {tensor.shape}: it has no row for each expert"
        )
    for row in range(num_rows):
        head, expert = divmod(row, len(sources))
        yield row * width, (row + 1) * width, tensor.name, (head * num_before + sources[expert]) * width
    if tail:
        yield num_rows * width, tensor.numel, tensor.name, old_rows * width


def _cut_alike(rows: IntArray, layout: StateLayout) -> IntArray:
    """[n, 4], rows (new tensor, start, stop, rank): the pieces, divided where the old tensors are.

    Args:
        rows: [n, 5], (new tensor, start, stop, old tensor, its first element), sorted.
    """
    line = layout.line()
    held_begin = line[layout.shards[:, 0]] + layout.shards[:, 1]
    held_end = line[layout.shards[:, 0]] + layout.shards[:, 2]
    begin = line[rows[:, 3]] + rows[:, 4]
    end = begin + rows[:, 2] - rows[:, 1]
    first = np.searchsorted(held_begin, begin, side="right") - 1
    count = np.searchsorted(held_begin, end, side="left") - first
    piece = np.repeat(np.arange(len(rows)), count)
    shard = np.repeat(first - np.cumsum(count) + count, count) + np.arange(count.sum())
    low, high = np.maximum(begin[piece], held_begin[shard]), np.minimum(end[piece], held_end[shard])
    offset = rows[piece, 1] - begin[piece]
    return np.column_stack([rows[piece, 0], low + offset, high + offset, layout.shards[shard, 3]])
