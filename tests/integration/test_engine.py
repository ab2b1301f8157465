"""The DeepSpeed engine on real gloo ranks: against plain torch, against stock DeepSpeed, against itself elsewhere."""

import gc
import os
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import Store

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.state_spec import expert_of
from orchestrator.engine.process_groups import connect, disconnect
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.spec.optimizer import is_decayed
from tests.support import devices, small
from tests.support.ranks import Ranks

STEPS = 6
UNEVEN = ExpertPlacement(4, 3, ((0,), (0,), (0,), (2,)))  # rank 1 holds none
OVERLAPPING = ExpertPlacement(3, 3, ((0, 1), (1, 2), (0,)))  # two colours: rank 1 is in two replica sets


def _losses(
    rank: int,
    world_size: int,
    store: Store,
    prefix: str,
    kind: str,
    placement: ExpertPlacement,
    precision: str,
    stage: int,
    bucket_mb: float = 25.0,
    nodes: tuple[str, ...] = (),
) -> list[float]:
    train = small.train_spec(precision, stage)
    groups, _, engine = small.build(kind, store, prefix, rank, placement, train, nodes=nodes, bucket_mb=bucket_mb)
    losses = small.train_steps(engine, groups, range(STEPS))
    engine.close()
    return losses


@pytest.fixture(scope="module")
def oracle(ranks: Ranks) -> list[float]:
    """Losses of plain torch in a world of one."""
    losses: list[float] = ranks.run(_losses, 1, "reference", ExpertPlacement.balanced(4, 1), "fp32", 1)[0]
    return losses


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    "placement",
    [
        pytest.param(ExpertPlacement.balanced(4, 1), id="one"),
        pytest.param(ExpertPlacement.balanced(4, 3), id="uneven"),
        pytest.param(UNEVEN, id="a rank without experts"),
        pytest.param(ExpertPlacement.balanced(4, 6), id="more ranks than experts"),
    ],
)
def test_losses_equal_plain_torch_at_any_world_size(
    ranks: Ranks, oracle: list[float], placement: ExpertPlacement, stage: int
) -> None:
    for losses in ranks.run(_losses, placement.world_size, "deepspeed", placement, "fp32", stage):
        assert losses == pytest.approx(oracle, rel=1e-5)
    assert oracle[-1] < oracle[0] - 0.2


@pytest.mark.parametrize("stage", [1, 2])
def test_ranks_with_more_experts_reduce_the_same_gradients_together(
    ranks: Ranks, oracle: list[float], stage: int
) -> None:
    """As in a large model: gradients fill many buckets."""
    for losses in ranks.run(_losses, 3, "deepspeed", ExpertPlacement.balanced(4, 3), "fp32", stage, 0.02):
        assert losses == pytest.approx(oracle, rel=1e-5)


@pytest.mark.parametrize("nodes", [tuple("xxxyyy"), tuple("xxxxxy"), tuple("xyxzyx")], ids="".join)
def test_losses_don_t_depend_on_which_replica_a_token_is_sent_to(
    ranks: Ranks, oracle: list[float], nodes: tuple[str, ...]
) -> None:
    placement = ExpertPlacement.balanced(4, 6, nodes)
    for losses in ranks.run(_losses, 6, "deepspeed", placement, "fp32", 1, 25.0, nodes):
        assert losses == pytest.approx(oracle, rel=1e-5)


def test_an_expert_may_have_holders_that_overlap_with_anothers(ranks: Ranks) -> None:
    plain = ranks.run(_losses, 1, "reference", ExpertPlacement.balanced(3, 1), "fp32", 1)[0]
    for losses in ranks.run(_losses, 3, "deepspeed", OVERLAPPING, "fp32", 1):
        assert losses == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("stage", [1, 2])
def test_bf16_with_fp32_masters_trains_the_same_at_every_world_size(
    ranks: Ranks, oracle: list[float], stage: int
) -> None:
    alone = ranks.run(_losses, 1, "deepspeed", ExpertPlacement.balanced(4, 1), "bf16", stage)[0]
    together = ranks.run(_losses, 3, "deepspeed", ExpertPlacement.balanced(4, 3), "bf16", stage)[0]
    assert together == pytest.approx(alone, rel=1e-3)
    assert alone == pytest.approx(oracle, rel=1e-2)


def _stock_losses(rank: int, world_size: int, store: Store, prefix: str, precision: str, stage: int) -> list[float]:
    """deepspeed.initialize as its documentation has it, around the same model: even expert parallelism, mean of
    micro-batches' mean losses, which equals ours because all micro-batches have equally many tokens."""
    import deepspeed
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split
    from deepspeed.utils import groups as registry

    from orchestrator.engine.deepspeed.engine import _ExpertMarker
    from orchestrator.engine.deepspeed.process_setup import unregister

    os.environ.setdefault("LOCAL_RANK", "0")
    placement = ExpertPlacement.balanced(4, world_size)
    groups = connect(store, prefix, rank, placement, devices.backend())
    with devices.device():
        home = ExpertParallelContext(placement, rank, groups.exchange)
        model = MoELanguageModel(small.model_spec(), small.VOCAB, home)
    model.init_weights(0)

    class Stock(_ExpertMarker):
        def set_deepspeed_parallelism(self, *args: Any, **kwargs: Any) -> None:
            registry._create_expert_and_data_parallel(world_size)

    model.add_module("marker", Stock(4))
    for name, param in model.named_parameters():
        if expert_of(name) is not None:
            param.allreduce = False  # type: ignore[attr-defined]
            param.group_name = f"ep_size_{world_size}"  # type: ignore[attr-defined]
    per_rank = small.NUM_SLOTS // world_size
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": small.ROWS,
        "gradient_accumulation_steps": per_rank,
        "gradient_clipping": 1.0,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 3e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "torch_adam": True},
        },
        "zero_optimization": {"stage": stage},
    }
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    decayed = {name: is_decayed(name, p.shape) for name, p in model.named_parameters()}
    named = [
        {
            "name": f"decayed: {wanted}",
            "params": [p for name, p in model.named_parameters() if decayed[name] == wanted],
            "weight_decay": 0.1 * wanted,
        }
        for wanted in (False, True)
    ]
    params = split(named)
    engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=params, config=config)
    losses = []
    for step in range(STEPS):
        total = torch.zeros((), dtype=torch.float64, device=devices.device())
        for number in range(rank * per_rank, (rank + 1) * per_rank):
            batch = small.micro_batch(step, number)
            loss = engine(batch["inputs"], batch["targets"]) / (small.ROWS * small.LENGTH)
            engine.backward(loss)
            engine.step()
            total += float(loss)
        torch.distributed.all_reduce(total)
        losses.append(float(total) / small.NUM_SLOTS)
    engine.destroy()
    unregister()
    return losses


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_equal_stock_deepspeed(ranks: Ranks, precision: str, stage: int) -> None:
    stock = ranks.run(_stock_losses, 2, precision, stage)[0]
    ours = ranks.run(_losses, 2, "deepspeed", ExpertPlacement.balanced(4, 2), precision, stage)[0]
    assert ours == pytest.approx(stock, rel=1e-6 if precision == "fp32" else 2e-3)


def _weights(
    rank: int,
    world_size: int,
    store: Store,
    prefix: str,
    placement: ExpertPlacement,
    precision: str,
    stage: int,
    overlap: bool,
) -> list[torch.Tensor]:
    train = small.train_spec(precision, stage)
    groups, _, engine = small.build("deepspeed", store, prefix, rank, placement, train, bucket_mb=0.02, overlap=overlap)
    small.train_steps(engine, groups, range(3))
    weights = [held.data.cpu() for _, held in engine.ranges()]
    engine.close()
    return weights


@pytest.mark.parametrize(
    ("placement", "precision", "stage"),
    [
        pytest.param(UNEVEN, "fp32", 1, id="uneven, fp32"),
        pytest.param(UNEVEN, "bf16", 2, id="uneven, bf16, stage 2"),
        pytest.param(ExpertPlacement.balanced(4, 6), "bf16", 1, id="replicated, bf16"),
        pytest.param(ExpertPlacement.balanced(4, 6), "fp32", 2, id="replicated, fp32, stage 2"),
    ],
)
def test_overlap_changes_no_bit(ranks: Ranks, placement: ExpertPlacement, precision: str, stage: int) -> None:
    overlapped, afterwards = (
        ranks.run(_weights, placement.world_size, placement, precision, stage, overlap) for overlap in (True, False)
    )
    for mine, others in zip(overlapped, afterwards, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))


def _spans(
    rank: int, world_size: int, store: Store, prefix: str, placement: ExpertPlacement, precision: str, stage: int
) -> list[tuple[str, int, int, int]]:
    _, _, engine = small.build("deepspeed", store, prefix, rank, placement, small.train_spec(precision, stage))
    found = [(name, r.start, r.stop, r.data.element_size()) for name, r in engine.ranges()]
    engine.close()
    return sorted(found)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "placement",
    [
        pytest.param(ExpertPlacement.balanced(4, 3), id="uneven"),
        pytest.param(UNEVEN, id="a rank without experts"),
        pytest.param(OVERLAPPING, id="overlapping replica sets"),
        pytest.param(ExpertPlacement.balanced(4, 5), id="more ranks than experts"),
    ],
)
def test_the_engine_holds_the_ranges_of_the_layout(ranks: Ranks, placement: ExpertPlacement, precision: str) -> None:
    layout = small.layout_of(placement, precision)
    held = ranks.run(_spans, placement.world_size, placement, precision, 1)
    for rank, spans in enumerate(held):
        wanted = [
            (layout.names[tensor], start, stop, int(layout.itemsize[tensor]))
            for tensor, start, stop in layout.ranges_of(f"w{rank}").tolist()
        ]
        assert spans == sorted(wanted)


def _non_finite(rank: int, world_size: int, store: Store, prefix: str, precision: str, stage: int) -> tuple[bool, bool]:
    """One rank's micro-batch overflows: no rank may change its state, and the next step must be applied."""
    placement = ExpertPlacement.balanced(4, world_size)
    groups, model, engine = small.build("deepspeed", store, prefix, rank, placement, small.train_spec(precision, stage))
    small.train_steps(engine, groups, range(1))
    before = [(name, r.data.clone()) for name, r in engine.ranges()]
    if rank == 1:
        model.head.register_hook(lambda grad: grad * float("inf"))
    engine.accumulate(small.micro_batch(1, rank), 100, last=True)
    outcome = engine.step(3e-3)
    same = all(torch.equal(old, held.data) for (_, old), (_, held) in zip(before, engine.ranges(), strict=True))
    engine.close()
    return outcome.applied, same


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_non_finite_update_is_skipped_on_all_ranks(ranks: Ranks, precision: str, stage: int) -> None:
    assert ranks.run(_non_finite, 2, precision, stage) == [(False, True), (False, True)]


def _growth_mb(rank: int, world_size: int, store: Store, prefix: str, rebuilds: int) -> float:
    """Resident memory per rebuild, over the second half of the rebuilds, in MB."""
    import psutil

    placement = ExpertPlacement.balanced(4, world_size)
    marks = []
    for number in range(rebuilds):
        groups, model, engine = small.build(
            "deepspeed", store, f"{prefix}/{number}", rank, placement, small.train_spec()
        )
        small.train_steps(engine, groups, range(1))
        engine.close()
        del groups, model, engine
        disconnect()
        gc.collect()
        marks.append(psutil.Process().memory_info().rss / 2**20)
    half = len(marks) // 2
    return (marks[-1] - marks[half]) / (len(marks) - 1 - half)


@pytest.mark.long_emulated
def test_rebuilding_does_not_grow_the_process(ranks: Ranks) -> None:
    assert max(ranks.run(_growth_mb, 2, 30)) < 1.0


def _frozen(
    rank: int, world_size: int, store: Store, prefix: str, precision: str, trainable: tuple[str, ...]
) -> dict[str, tuple[bool, set[str]]]:
    """By parameter here, whether steps have changed it, and the kinds of its state."""
    train = small.train_spec(precision).model_copy(update={"trainable": trainable})
    placement = ExpertPlacement.balanced(4, world_size)
    groups, model, engine = small.build("deepspeed", store, prefix, rank, placement, train)
    before = {name: param.detach().clone() for name, param in model.named_parameters() if "_filler" not in name}
    small.train_steps(engine, groups, range(2))
    names = engine.ranges().names()
    changed = {name: not torch.equal(dict(model.named_parameters())[name], old) for name, old in before.items()}
    kinds = {name: {n.partition("/")[0] for n in names if n.partition("/")[2] == name} for name in before}
    engine.close()
    return {name: (changed[name], kinds[name]) for name in before}


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    ("precision", "trainable"),
    [
        ("fp32", ("head", "*.experts.*", "*.query")),
        ("bf16", ("head", "*.experts.*", "*.query")),
        ("fp32", ("layers.2.mlp.experts.*",)),  # and nothing before them that needs the tokens' gradients
        ("fp32", ("head", "layers.1.mlp.experts.*.down")),
        ("fp32", ("norm.weight",)),
    ],
    ids=str,
)
def test_what_is_not_trained_stays_as_it_is_and_keeps_nothing(
    ranks: Ranks, precision: str, trainable: tuple[str, ...]
) -> None:
    for world_size in (1, 2, 3):
        for found in ranks.run(_frozen, world_size, precision, trainable):
            for name, (changed, kinds) in found.items():
                is_trained = any(fnmatchcase(name, pattern) for pattern in trainable)
                assert changed == is_trained, name
                assert is_trained or kinds == {"param"}, name
