"""A rank on a GPU beside one on the CPU. `pytest --device gpu tests/gpu` needs a GPU; `--device emulated` shows that
they run."""

import os
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import Store

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.engine.numerics import pin
from orchestrator.state.digest import digests
from orchestrator.state.ranges import NamedRanges
from orchestrator.state.stream_copies import StreamCopies
from tests.support import devices, small
from tests.support.ranks import Ranks

pytestmark = pytest.mark.off_cpu

STEPS = 8


def _trained(
    rank: int, world_size: int, store: Store, prefix: str, determinism: str, precision: str, recompute: str
) -> tuple[list[float], list[int]]:
    """Losses, and digests of the state after some steps."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # before the first product, as in a worker's environment
    if determinism == "exact":
        pin(devices.device())
    train = small.train_spec(precision, determinism=determinism)
    placement, spec = ExpertPlacement.balanced(4, world_size), small.model_spec(recompute=recompute)
    groups, _, engine = small.build("deepspeed", store, prefix, rank, placement, train, spec=spec)
    losses = small.train_steps(engine, groups, range(STEPS))
    found = digests((held.start, held.data) for _, held in engine.ranges())
    engine.close()
    torch.use_deterministic_algorithms(False)
    return losses, found


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(("precision", "error"), [("fp32", 1e-4), ("bf16", 5e-3)])
def test_losses_are_nearly_those_of_the_cpu(
    ranks: Ranks, cpu_ranks: Ranks, precision: str, error: float, recompute: str
) -> None:
    how = ("fast", precision, recompute)
    (losses, _), (wanted, _) = ranks.run(_trained, 1, *how)[0], cpu_ranks.run(_trained, 1, *how)[0]
    assert losses == pytest.approx(wanted, rel=error) and losses[-1] < losses[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_exact_runs_have_the_same_bits(ranks: Ranks, precision: str) -> None:
    first, second = (ranks.run(_trained, 1, "exact", precision, "none") for _ in range(2))
    assert first == second


def _copied(rank: int, world_size: int, store: Store, prefix: str) -> bool:
    """Whether a copy beside the computation has what was there when it was begun."""
    device = devices.device()
    copies, state = StreamCopies(device), NamedRanges()
    data = torch.arange(1 << 22, device=device, dtype=torch.float32)
    for _ in range(50):  # keeps the device busy
        data.mul_(-1.0)
    state.add("param/a", 0, data)
    mark = copies.mark()
    pinned = torch.empty(len(data), device="cpu", pin_memory=True)
    with copies.after(mark):
        pinned.copy_(state.view("param/a", 0, len(data)), non_blocking=True)
    return torch.equal(pinned, torch.arange(1 << 22, dtype=torch.float32))


def test_copies_on_a_stream_of_their_own_are_whole(ranks: Ranks) -> None:
    assert ranks.run(_copied, 1) == [True]


def _card(rank: int, world_size: int, store: Store, prefix: str) -> dict[str, Any]:
    properties: Any = torch.cuda.get_device_properties(devices.device())
    return {"name": properties.name, "gib": properties.total_memory >> 30, "torch": torch.__version__}


def test_the_card_is_named(ranks: Ranks, record_property: Any) -> None:
    (card,) = ranks.run(_card, 1)
    record_property("card", card)
    print(card)
    assert card["gib"] > 0
