"""States made again from a whole snapshot and gradients, on real gloo ranks: the very bits that training made."""

import pytest
import torch
from torch._C._distributed_c10d import Store

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.engine.optim.replayer import Replayer
from orchestrator.model.factory import catalogue
from orchestrator.state.ranges import NamedRanges
from orchestrator.state.snapshot import Update, copy_into
from orchestrator.state.snapshot_store import RankSnapshots
from tests.support import devices, small
from tests.support.ranks import Ranks

pytestmark = pytest.mark.long_emulated

WHOLE_EVERY = 4
LAST_STEPS = (0, 3, 4, 6, 9)  # the first, those around the second whole snapshot, one between, one after the third
UNEVEN = ExpertPlacement(4, 3, ((0,), (0,), (0,), (2,)))  # rank 1 holds none
OVERLAPPING = ExpertPlacement(3, 3, ((0, 1), (1, 2), (0,)))  # weights that some other ranks have, not all


def _clone(ranges: NamedRanges) -> NamedRanges:
    copy = NamedRanges()
    for name, held in ranges:
        copy.add(name, held.start, held.data.clone())
    return copy


def _differing(kept: NamedRanges, truth: NamedRanges) -> list[str]:
    return [name for name, held in kept if not torch.equal(held.data, truth.view(name, held.start, held.stop).cpu())]


def _replayed(
    rank: int,
    world_size: int,
    store: Store,
    prefix: str,
    placement: ExpertPlacement,
    precision: str,
    stage: int,
    compression: str,
) -> tuple[int, list[str]]:
    """How many states were made again, and the tensors in which they differed from what training had made."""
    train = small.train_spec(precision, stage)
    groups, model, engine = small.build("deepspeed", store, prefix, rank, placement, train, compression=compression)
    layout = small.layout_of(placement, precision, compression=compression)
    params, _ = catalogue(small.model_spec(placement.num_experts), small.VOCAB)
    replayer = Replayer(train, params, devices.device())
    truth: dict[int, NamedRanges] = {}
    num_replayed, differing = 0, []
    done = 0
    for last in LAST_STEPS:  # anew each time: a state may be made again in the place of another
        own = RankSnapshots(0, rank, layout, False, WHOLE_EVERY, replayer)
        kept = RankSnapshots(0, rank, layout, True, WHOLE_EVERY, replayer)
        first = last * 100
        for step in range(first, first + last + 1):
            lr = 1e-3 * (1 + step % 3)
            _, outcome = small.train_step(engine, groups, step, lr, keep_gradients=True)
            model.moe_layers[0].router.correction_bias_E.add_(0.001 * step)
            assert outcome.applied and outcome.gradients is not None
            done += 1
            is_whole = (step - first) % WHOLE_EVERY == 0
            update = None if is_whole else Update(done, lr)
            mine = own.begin(step, "", update)
            live = engine.ranges().detached()
            for name, held in outcome.gradients:
                live.add(name, held.start, held.data)
            copy_into(mine, live)
            own.finish(mine)
            theirs = kept.begin(step, "", update)
            kept.shared(theirs)[:] = own.shared(mine)
            kept.finish(theirs)
            truth[step] = _clone(engine.ranges())
        for snapshots in (own, kept):
            for step in snapshots.steps():
                num_replayed += (step - first) % WHOLE_EVERY != 0
                differing += _differing(snapshots.state(step).ranges, truth[step])
        engine.on_state_loaded(done)
    engine.close()
    return num_replayed, differing


@pytest.mark.parametrize(
    ("placement", "precision", "stage", "compression"),
    [
        pytest.param(ExpertPlacement.balanced(4, 1), "fp32", 1, "none", id="one"),
        pytest.param(ExpertPlacement.balanced(4, 3), "bf16", 2, "none", id="three, bf16, stage 2"),
        pytest.param(UNEVEN, "fp32", 2, "none", id="a rank without experts, stage 2"),
        pytest.param(OVERLAPPING, "bf16", 1, "none", id="replicas on some ranks, bf16"),
        pytest.param(ExpertPlacement.balanced(4, 6), "bf16", 1, "none", id="more ranks than experts"),
        pytest.param(ExpertPlacement.balanced(4, 3), "bf16", 2, "topk", id="three, topk"),
        pytest.param(ExpertPlacement.balanced(4, 3), "fp32", 1, "powersgd", id="three, powersgd"),
    ],
)
def test_a_state_made_again_has_the_same_bits(
    ranks: Ranks, placement: ExpertPlacement, precision: str, stage: int, compression: str
) -> None:
    for num_replayed, differing in ranks.run(_replayed, placement.world_size, placement, precision, stage, compression):
        assert num_replayed > 10
        assert differing == []
