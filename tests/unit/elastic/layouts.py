"""Layouts to plan between, what lies in memory under one, and a plan carried out, all on plain arrays."""

import numpy as np
from hypothesis import strategies as st

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.state_layout import StateLayout
from orchestrator.elastic.state_spec import Origin, ParamSpec, Sharing, StateTensor
from orchestrator.elastic.transfer_plan import TransferPlan
from orchestrator.elastic.world import World
from tests.support.layouts import layout_of_state

Memory = dict[str, dict[int, np.ndarray]]  # worker -> tensor -> its values, NaN where it holds nothing


def tensor_of(name: str, sharing: Sharing, numel: int, dtype: str = "float32") -> StateTensor:
    """A tensor that no update makes."""
    like = ParamSpec("like", (numel,), None) if sharing is Sharing.SHARDED else None
    return StateTensor(name, (numel,), sharing, Origin.COPY, like, dtype)


def whole(kinds: list[Sharing], numel: list[int], world: World, holders: list[tuple[int, ...]]) -> StateLayout:
    """A layout of tensors that are held whole, with holders each, or sharded evenly over their holders."""
    dtypes = ("bfloat16", "float32")
    rows = enumerate(zip(kinds, numel, strict=True))
    tensors = [tensor_of(f"t{i}", sharing, size, dtypes[i % 2]) for i, (sharing, size) in rows]
    sets = sorted({tuple(sorted(ranks)) for ranks in holders})
    holder_set = [
        -1 if k == Sharing.SHARDED else sets.index(tuple(sorted(ranks)))
        for k, ranks in zip(kinds, holders, strict=True)
    ]
    shards = []
    for tensor, (kind, size, ranks) in enumerate(zip(kinds, numel, holders, strict=True)):
        if kind == Sharing.SHARDED:
            cuts = [size * i // len(ranks) for i in range(len(ranks) + 1)]
            shards += [(tensor, a, b, r) for r, a, b in zip(ranks, cuts[:-1], cuts[1:], strict=True) if a < b]
    return StateLayout(
        world=world,
        tensors={tensor.name: tensor for tensor in tensors},
        holder_sets=tuple(sets),
        holder_set=np.array(holder_set, dtype=np.int64),
        shards=np.array(shards, dtype=np.int64).reshape(-1, 4),
    )


@st.composite
def worlds(draw: st.DrawFn, generation: int) -> World:
    members = draw(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=6, unique=True))
    return World(generation, tuple(members))


@st.composite
def free_pairs(draw: st.DrawFn) -> tuple[StateLayout, StateLayout]:
    """Any kinds, any holders, in any order of ranks."""
    kinds = draw(st.lists(st.sampled_from(Sharing), max_size=5))
    numel = [draw(st.integers(1, 12)) for _ in kinds]
    pair = []
    for generation in (0, 1):
        world = draw(worlds(generation))
        ranks = st.lists(st.integers(0, world.size - 1), min_size=1, unique=True)
        holders = [tuple(draw(ranks)) for _ in kinds]
        pair.append(whole(kinds, numel, world, holders))
    return pair[0], pair[1]


@st.composite
def training_pairs(draw: st.DrawFn) -> tuple[StateLayout, StateLayout]:
    """Training states before and after a rescale: balanced placements, or uneven ones with ranks that hold nothing."""
    num_experts = draw(st.integers(1, 4))
    params = [
        ParamSpec(f"p{i}", (draw(st.integers(1, 9)),), draw(st.none() | st.integers(0, num_experts - 1)))
        for i in range(draw(st.integers(1, 6)))
    ]
    mixed_precision = draw(st.booleans())
    old, new = draw(worlds(0)), draw(worlds(1))
    ranks = st.sets(st.integers(0, old.size - 1), min_size=1).map(lambda s: tuple(sorted(s)))
    uneven = st.tuples(*[ranks] * num_experts).map(lambda holders: ExpertPlacement(num_experts, old.size, holders))
    before = draw(st.just(ExpertPlacement.balanced(num_experts, old.size)) | uneven)
    after = ExpertPlacement.rebalanced(before, old, new)
    return (
        layout_of_state(params, before, old, mixed_precision, [("bias", (2,))]),
        layout_of_state(params, after, new, mixed_precision, [("bias", (2,))]),
    )


pairs = free_pairs() | training_pairs()


def elements(layout: StateLayout) -> set[tuple[int, int, str]]:
    """(tensor, element, worker) for everything that is held."""
    return {
        (tensor, i, worker)
        for worker in layout.world.members
        for tensor, start, stop in layout.ranges_of(worker).tolist()
        for i in range(start, stop)
    }


def fill(layout: StateLayout) -> Memory:
    """Every element its own value; the ranks' values of a partial tensor differ. Whole numbers, so sums are exact."""
    memory: Memory = {worker: {} for worker in layout.world.members}
    line = np.append(0, np.cumsum(layout.numel))
    for rank, worker in enumerate(layout.world.members):
        for tensor, start, stop in layout.ranges_of(worker).tolist():
            values = memory[worker].setdefault(tensor, np.full(layout.numel[tensor], np.nan))
            values[start:stop] = line[tensor] + np.arange(start, stop)
            if layout.sharing[tensor] == Sharing.PARTIAL:
                values[start:stop] *= 10.0**rank
    return memory


def execute(plan: TransferPlan, before: Memory, numel: np.ndarray) -> Memory:
    """Every worker carries out its own part; messages pair up by order alone."""
    after: Memory = {}
    parts = {worker: plan.for_worker(worker) for worker in plan.workers}
    for worker, part in parts.items():
        mine: dict[int, np.ndarray] = {}
        for tensor, start, stop in part.keeps.tolist():
            new = mine.setdefault(tensor, np.full(numel[tensor], np.nan))
            new[start:stop] = before[worker][tensor][start:stop]
        for tensor, start, stop in part.zeros.tolist():
            mine.setdefault(tensor, np.full(numel[tensor], np.nan))[start:stop] = 0
        for source, rows in part.receives.items():
            sent = parts[source].sends[worker]
            messages = [before[source][tensor][start:stop] for tensor, start, stop in sent.tolist()]
            for (tensor, start, stop), message in zip(rows.tolist(), messages, strict=True):
                new = mine.setdefault(tensor, np.full(numel[tensor], np.nan))
                new[start:stop] = new[start:stop] + message if plan.accumulates[tensor] else message
        after[worker] = mine
    return after
