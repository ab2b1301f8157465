"""Training with products in float8: it learns, and the state is that of a training without."""

import pytest
from torch._C._distributed_c10d import Store

from orchestrator.elastic.expert_placement import ExpertPlacement
from tests.support import small
from tests.support.ranks import Ranks

STEPS = 8


def _trained(
    rank: int, world_size: int, store: Store, prefix: str, precision: str, float8: bool
) -> tuple[list[float], list[tuple[str, int, int, str]]]:
    """Losses; and names, starts, sizes and formats of the state."""
    train = small.train_spec(precision).model_copy(update={"float8": float8})
    groups, _, engine = small.build("deepspeed", store, prefix, rank, ExpertPlacement.balanced(4, world_size), train)
    losses = small.train_steps(engine, groups, range(STEPS))
    state = [(name, part.start, part.data.numel(), str(part.data.dtype)) for name, part in engine.ranges()]
    engine.close()
    return losses, state


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.long_emulated), "bf16"])
def test_it_learns_nearly_as_in_full_and_keeps_the_same_state(ranks: Ranks, precision: str) -> None:
    losses, state = ranks.run(_trained, 2, precision, True)[1]
    wanted, plain_state = ranks.run(_trained, 2, precision, False)[1]
    assert losses != wanted
    assert losses == pytest.approx(wanted, rel=0.02)
    assert losses[-1] < losses[0] - 0.5 * (wanted[0] - wanted[-1])
    assert state == plain_state
