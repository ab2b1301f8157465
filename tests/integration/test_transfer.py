"""Transfer plans carried out between real gloo processes, compared element by element."""

import hashlib
import resource

import numpy as np
import pytest
import torch
from torch._C._distributed_c10d import Store

from orchestrator.comm.transport.peer_group import PeerGroup
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.state_layout import StateLayout
from orchestrator.elastic.state_spec import Origin, ParamSpec, Sharing, StateTensor
from orchestrator.elastic.transfer_plan import TransferPlan
from orchestrator.elastic.world import World, union
from orchestrator.state.digest import StateDigests, differing
from orchestrator.state.ranges import NamedRanges
from orchestrator.state.transfer import CHUNK_BYTES, chunks, execute_transfer
from tests.support import devices
from tests.support.layouts import layout_of_state
from tests.support.ranks import Ranks

PARAMS = [ParamSpec("embedding", (4099,), None), ParamSpec("norm", (7,), None)] + [
    ParamSpec(f"layers.{layer}.experts.{e}.{w}", (1001,), e)
    for layer in range(2)
    for e in range(5)
    for w in ("up", "down")
]
BUFFERS = [("bias", (5,))]
DTYPES = {2: torch.bfloat16, 4: torch.float32}


def _layout(generation: int, members: tuple[str, ...]) -> StateLayout:
    placement = ExpertPlacement.balanced(5, len(members))
    return layout_of_state(PARAMS, placement, World(generation, members), True, BUFFERS)


def _value(layout: StateLayout, tensor: int) -> torch.Tensor:
    """The whole tensor, from the ranges of its holders."""
    generator = torch.Generator().manual_seed(tensor)
    numel, itemsize = int(layout.numel[tensor]), int(layout.itemsize[tensor])
    return torch.randn(numel, generator=generator).to(DTYPES[itemsize])


def _memory(layout: StateLayout, worker: str, fill: bool) -> NamedRanges:
    ranges = NamedRanges()
    for tensor, start, stop in layout.ranges_of(worker).tolist():
        value = _value(layout, tensor)[start:stop].clone()
        value = value if fill else torch.full_like(value, float("nan"))
        # As of a survivor, which hands over its own shard and a snapshot of another one.
        is_snapshot = fill and tensor % 2 == 1
        ranges.add(layout.names[tensor], start, value if is_snapshot else value.to(devices.device()))
    return ranges


def _move(
    rank: int, world_size: int, store: Store, prefix: str, before: tuple[str, ...], after: tuple[str, ...], flip: bool
) -> tuple[dict[str, list[tuple[int, bytes]]], int, int, list[str]]:
    old, new = _layout(0, before), _layout(1, after)
    workers = union(old.world, new.world)
    me = workers[rank]
    plan = TransferPlan.between(old, new)
    peers = PeerGroup(store, prefix, workers, me)
    held = _memory(old, me, fill=True) if me in old.world else None
    memory = _memory(new, me, fill=False) if me in new.world else None
    replicated = frozenset(n for n, t in old.tensors.items() if t.sharing is Sharing.REPLICATED)
    digests = StateDigests(old.names, replicated, held)
    execute_transfer(plan, me, held, memory, peers)
    if flip and memory is not None and me == after[0]:
        memory.view("buffer/bias", 2, 3).view(torch.uint8)[0] ^= 1
    wrong = differing(old.names, digests, StateDigests(new.names, replicated, memory), peers)
    peers.close()
    found: dict[str, list[tuple[int, bytes]]] = {}
    for name, r in memory if memory is not None else ():
        found.setdefault(name, []).append((r.start, r.data.cpu().view(torch.uint8).numpy().tobytes()))
    return found, peers.sent_bytes, plan.moved_bytes, wrong


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param("a b", "a b c", id="grow"),
        pytest.param("a b c d", "b d", id="shrink"),
        pytest.param("a", "a b c d", id="from one"),
        pytest.param("a b", "c d", id="everyone new"),
        pytest.param("a b c", "c b a", id="other ranks"),
        pytest.param("a b c d e f", "b c d e f", id="more ranks than experts"),
    ],
)
def test_every_tensor_arrives_whole(ranks: Ranks, before: str, after: str) -> None:
    old_members, new_members = tuple(before.split()), tuple(after.split())
    layout = _layout(1, new_members)
    workers = union(World(0, old_members), World(1, new_members))
    results = ranks.run(_move, len(workers), old_members, new_members, False)
    for tensor, name in enumerate(layout.names):
        wanted = hashlib.sha256(_value(layout, tensor).view(torch.uint8).numpy().tobytes()).hexdigest()
        pieces = [piece for found, *_ in results for piece in found.get(name, ())]
        if layout.sharing[tensor] == Sharing.SHARDED:
            pieces = [(0, b"".join(data for _, data in sorted(pieces)))]
        assert pieces
        for _, data in pieces:
            assert hashlib.sha256(data).hexdigest() == wanted, name
    assert sum(sent for _, sent, _, _ in results) == results[0][2]
    assert all(wrong == [] for *_, wrong in results)


def test_one_flipped_bit_is_named(ranks: Ranks) -> None:
    results = ranks.run(_move, 3, ("a", "b"), ("a", "b", "c"), True)
    assert all(wrong == ["buffer/bias"] for *_, wrong in results)


def _peak_bytes(rank: int, world_size: int, store: Store, prefix: str, numel: int) -> tuple[int, int]:
    """What a transfer needs beside the two shards, and the size of the shards."""
    params = [ParamSpec("w", (numel,), None)]
    worlds = (World(0, ("a", "b")), World(1, ("b", "c")))
    old, new = (layout_of_state(params, ExpertPlacement.balanced(1, 2), world, False, []) for world in worlds)
    me = union(*worlds)[rank]

    def memory(layout: StateLayout) -> NamedRanges | None:
        ranges = NamedRanges()
        for tensor, start, stop in layout.ranges_of(me).tolist() if me in layout.world else ():
            ranges.add(layout.names[tensor], start, torch.ones(stop - start, device=devices.device()))
        return ranges

    held, wanted = memory(old), memory(new)
    peers = PeerGroup(store, prefix, union(*worlds), me)
    plan = TransferPlan.between(old, new)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    execute_transfer(plan, me, held, wanted, peers)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peers.close()
    return (after - before) * 1024, sum(r.num_bytes() for r in (held, wanted) if r is not None)


def test_a_transfer_needs_no_more_memory_than_a_message_per_pair(ranks: Ranks) -> None:
    slack = 16 << 20  # threads, buffers of gloo
    for peak_bytes, shard_bytes in ranks.run(_peak_bytes, 3, 12_000_000):
        assert shard_bytes >= 96_000_000
        assert peak_bytes <= 4 * CHUNK_BYTES + slack


def _adds_up(rank: int, world_size: int, store: Store, prefix: str) -> list[float]:
    """A partial tensor through 3 -> 2: what the leaver had is added to a staying member's."""

    name = "residual/w"
    residual = StateTensor(name, (6,), Sharing.PARTIAL, Origin.COPY)

    def layout(generation: int, members: tuple[str, ...]) -> StateLayout:
        return StateLayout(
            world=World(generation, members),
            tensors={name: residual},
            holder_sets=(tuple(range(len(members))),),
            holder_set=np.array([0]),
            shards=np.zeros((0, 4), dtype=np.int64),
        )

    old, new = layout(0, ("a", "b", "c")), layout(1, ("a", "b"))
    me = old.world.members[rank]
    plan = TransferPlan.between(old, new)
    held, memory = NamedRanges(), NamedRanges()
    held.add("residual/w", 0, torch.arange(6, dtype=torch.float32, device=devices.device()) * 10**rank)
    memory.add("residual/w", 0, torch.full((6,), float("nan"), device=devices.device()))
    peers = PeerGroup(store, prefix, plan.workers, me)
    execute_transfer(plan, me, held, memory if me in new.world else None, peers)
    peers.close()
    return memory.view("residual/w", 0, 6).tolist() if me in new.world else [0.0] * 6


def test_the_sum_of_a_partial_is_conserved(ranks: Ranks) -> None:
    results = ranks.run(_adds_up, 3)
    assert [sum(column) for column in zip(*results, strict=True)] == [111.0 * i for i in range(6)]


def test_messages_are_bounded_and_complete() -> None:
    rows = np.array([[0, 0, 10], [1, 5, 3 * CHUNK_BYTES], [2, 0, 7]])
    itemsize = np.array([4, 2, 4])
    messages = list(chunks(rows, itemsize))
    sizes = [sum((stop - start) * int(itemsize[t]) for t, start, stop in message) for message in messages]
    assert max(sizes) <= CHUNK_BYTES
    assert sum(sizes) == 40 + 2 * (3 * CHUNK_BYTES - 5) + 28
    assert messages[0][0] == (0, 0, 10)
