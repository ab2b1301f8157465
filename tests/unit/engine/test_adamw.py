"""An element's update has the same bits wherever partitions are cut, and replays have those of the step."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orchestrator.elastic.bucket_partition import PIECE_MULTIPLE
from orchestrator.engine.adamw import AdamW
from orchestrator.spec.train import TrainSpec

NUMEL = 64 * PIECE_MULTIPLE
TRAIN = TrainSpec(optimizer={"weight_decay": 0.1})  # type: ignore[arg-type]


def _updated(values: Tensor, gradients: list[Tensor], cuts: list[int]) -> dict[str, Tensor]:
    """After several steps of an optimizer each for the pieces between the cuts, each piece in memory of its own."""
    found: dict[str, list[Tensor]] = {"master": [], "exp_avg": [], "exp_avg_sq": []}
    borders = [0, *cuts, len(values)]
    for start, stop in pairwise(borders):
        master = torch.nn.Parameter(values[start:stop].clone())
        optimizer = AdamW([{"params": [master]}], TRAIN)
        zeros = {name: torch.zeros_like(master) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[master] = {"step": torch.zeros(()), **zeros}
        for gradient in gradients:
            master.grad = gradient[start:stop].clone()
            optimizer.step()
        found["master"].append(master.detach())
        for name in zeros:
            found[name].append(optimizer.state[master][name])
    return {name: torch.cat(parts) for name, parts in found.items()}


def _drawn() -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(NUMEL, generator=generator)
    return values, [torch.randn(NUMEL, generator=generator) * 10.0**-n for n in range(3)]


@given(st.sets(st.integers(1, NUMEL // PIECE_MULTIPLE - 1), max_size=6))
@settings(max_examples=30, deadline=None)
def test_updates_have_the_same_bits_wherever_partitions_are_cut(cuts: set[int]) -> None:
    values, gradients = _drawn()
    whole = _updated(values, gradients, [])
    pieces = _updated(values, gradients, sorted(cut * PIECE_MULTIPLE for cut in cuts))
    assert [name for name in whole if not torch.equal(whole[name], pieces[name])] == []


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="no vectors here")
def test_a_piece_that_fills_no_vectors_would_have_others() -> None:
    """Else partitions needn't be multiples of anything."""
    values, gradients = _drawn()
    whole = _updated(values, gradients, [])
    ragged = _updated(values, gradients, list(range(PIECE_MULTIPLE + 7, NUMEL, PIECE_MULTIPLE + 7)))
    assert any(not torch.equal(whole[name], ragged[name]) for name in whole)
