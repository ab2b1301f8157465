"""Ranges of a state under the names that they have in a model with other experts (`orchestrator.elastic.state_map`)."""

import torch

from orchestrator.elastic.state_map import StateMap
from orchestrator.elastic.state_spec import Sharing
from orchestrator.state.ranges import NamedRanges


@torch.no_grad()
def relabelled(ranges: NamedRanges, mapped: StateMap) -> NamedRanges:
    """The ranges as parts of the new tensors, as `StateMap.relabelled` describes them.

    Views, but for tensors that holders have whole and that consist of several pieces: these are copied. A range may be
    seen under several names, so the result is to be read only.
    """
    result = NamedRanges()
    for name, tensor in mapped.new.items():
        pieces = mapped.pieces[name]
        if tensor.sharing is not Sharing.SHARDED:
            if ranges.spans(mapped.source_of(name)):
                views = [ranges.view(old, first, first + stop - start) for start, stop, old, first in pieces]
                result.add(name, 0, views[0] if len(views) == 1 else torch.cat(views))
            continue
        for start, stop, old, first in pieces:
            for begin, end in ranges.spans(old):
                low, high = max(first, begin), min(first + stop - start, end)
                if low < high:
                    result.add(name, start + low - first, ranges.view(old, low, high))
    return result
