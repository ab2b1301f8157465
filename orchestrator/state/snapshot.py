"""Snapshots of shards in memory: this worker's own, and those that it keeps for other ranks.

A snapshot is one buffer, laid out by `orchestrator.elastic.snapshot_layout`: a whole shard, or the changes of a step.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from orchestrator.elastic.recovery_point import Holding
from orchestrator.elastic.snapshot_layout import SnapshotFormat
from orchestrator.elastic.state_spec import ITEM_BYTES, Inventory, Sharing
from orchestrator.state.ranges import NamedRanges


@dataclass(frozen=True)
class Update:
    """An optimizer update without its gradients.

    Args:
        number: of the update, counted from 1; AdamW's corrections depend on it.
    """

    number: int
    lr: float


@dataclass
class Snapshot:
    """A shard, or the part of it that only its rank has.

    Args:
        holding: what it is a snapshot of.
        note: the part of the state that is no tensor.
        ranges: views into the buffer.
        update: from the step before to this one, for a delta; None where the snapshot is whole.
    """

    holding: Holding
    note: str
    buffer: Tensor
    ranges: NamedRanges
    update: Update | None = None


Replay = Callable[[NamedRanges, Sequence[Snapshot]], None]
"""Apply updates again: on the state after the step before the first delta, in order."""


@torch.no_grad()
def copy_into(snapshot: Snapshot, ranges: NamedRanges) -> None:
    """Fill this rank's own snapshot from the live shard; a delta from the gradients as well. Copies from a GPU to
    pinned memory are complete once its stream is."""
    for name, place in snapshot.ranges:
        place.data.copy_(ranges.view(name, place.start, place.stop), non_blocking=True)


def views(form: SnapshotFormat, buffer: Tensor, shared_only: bool) -> NamedRanges:
    """The ranges of a snapshot in its buffer."""
    ranges = NamedRanges()
    count = form.num_shared if shared_only else len(form.names)
    places = np.stack([form.start, form.stop, form.offset], axis=1)[:count].tolist()
    for name, dtype, (start, stop, offset) in zip(form.names[:count], form.dtypes[:count], places, strict=True):
        data = buffer[offset : offset + (stop - start) * ITEM_BYTES[dtype]].view(getattr(torch, dtype))
        ranges.add(name, start, data)
    return ranges


@torch.no_grad()
def merge_ranges(parts: Collection[NamedRanges], tensors: Inventory) -> NamedRanges:
    """Ranges of several shards as one; elements that two of them hold are taken from the first, or added up where they
    are parts of a sum."""
    result = NamedRanges()
    sums: dict[str, Tensor] = {}
    for part in parts:
        for name, held in part:
            if tensors[name].sharing is Sharing.PARTIAL:  # each holds all elements
                sums[name] = held.data if name not in sums else sums[name] + held.data.to(sums[name].device)
            elif not any(start < held.stop and held.start < stop for start, stop in result.spans(name)):
                result.add(name, held.start, held.data)
    for name, total in sums.items():
        result.add(name, 0, total)
    return result
