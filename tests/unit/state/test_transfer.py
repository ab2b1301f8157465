"""How moves become messages, and plans carried out between workers that are threads of this process."""

import threading
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.comm.transport.peer_group import PeerGroup
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.state_layout import StateLayout
from orchestrator.elastic.state_spec import ParamSpec
from orchestrator.elastic.transfer_plan import TransferPlan
from orchestrator.elastic.world import World
from orchestrator.state.ranges import NamedRanges
from orchestrator.state.transfer import Piece, chunks, execute_transfer
from tests.support.layouts import layout_of_state
from tests.unit.comm.threads import PATIENCE_S, on_peers

ITEMSIZE = np.array([1, 2, 8])
PARAMS = [ParamSpec("dense", (101,), None), ParamSpec("experts.0", (33,), 0), ParamSpec("experts.1", (33,), 1)]

some_moves = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 50), st.integers(1, 90)), max_size=8).map(
    lambda moves: np.array([(t, start, start + length) for t, start, length in moves], dtype=np.int64).reshape(-1, 3)
)


def _bytes(pieces: list[Piece]) -> int:
    return sum((stop - start) * int(ITEMSIZE[tensor]) for tensor, start, stop in pieces)


@given(some_moves, st.integers(8, 64))
def test_messages_are_bounded_and_hold_every_element_once_in_order(rows: np.ndarray, chunk_bytes: int) -> None:
    messages = list(chunks(rows, ITEMSIZE, chunk_bytes))
    sent = [(t, i) for message in messages for t, start, stop in message for i in range(start, stop)]
    assert sent == [(t, i) for t, start, stop in rows.tolist() for i in range(start, stop)]
    assert all(0 < _bytes(message) <= chunk_bytes for message in messages)


@given(some_moves, st.integers(16, 64))
def test_a_message_is_sent_only_when_the_next_piece_would_not_fit_or_fills_one(
    rows: np.ndarray, chunk_bytes: int
) -> None:
    messages = list(chunks(rows, ITEMSIZE, chunk_bytes))
    for message, following in pairwise(messages):
        room = chunk_bytes - _bytes(message)
        assert room < ITEMSIZE[following[0][0]] or (len(following) == 1 and _bytes(following) > chunk_bytes - 8)


def test_no_moves_are_no_messages() -> None:
    assert list(chunks(np.zeros((0, 3), dtype=np.int64), ITEMSIZE)) == []


def _layout(generation: int, members: str) -> StateLayout:
    world = World(generation, tuple(members))
    return layout_of_state(PARAMS, ExpertPlacement.balanced(2, world.size), world, True, [("bias", (3,))])


def _memory(layout: StateLayout, worker: str, fill: bool) -> NamedRanges:
    ranges = NamedRanges()
    for tensor, start, stop in layout.ranges_of(worker).tolist():
        dtype = torch.bfloat16 if layout.itemsize[tensor] == 2 else torch.float32
        value = torch.arange(start, stop, dtype=torch.float32) + 1000 * tensor
        ranges.add(layout.names[tensor], start, (value if fill else torch.full_like(value, torch.nan)).to(dtype))
    return ranges


def _same(found: NamedRanges, wanted: NamedRanges) -> bool:
    pairs = zip(found, wanted, strict=True)
    return all(a == b and torch.equal(r.data, s.data) for (a, r), (b, s) in pairs)


@pytest.mark.parametrize(("before", "after"), [("a", "abc"), ("abc", "b"), ("ab", "ca")])
def test_every_rank_ends_with_its_ranges_of_the_new_layout_and_the_old_is_untouched(before: str, after: str) -> None:
    old, new = _layout(0, before), _layout(1, after)
    plan = TransferPlan.between(old, new)

    def run(peers: PeerGroup) -> int:
        held = _memory(old, peers.me, fill=True) if peers.me in old.world else None
        memory = _memory(new, peers.me, fill=False) if peers.me in new.world else None
        execute_transfer(plan, peers.me, held, memory, peers)
        assert memory is None or _same(memory, _memory(new, peers.me, fill=True))
        assert held is None or _same(held, _memory(old, peers.me, fill=True))
        return peers.sent_bytes

    assert sum(on_peers(plan.workers, run)) == plan.moved_bytes


def test_a_lost_peer_is_an_error_and_the_old_shard_is_untouched() -> None:
    old, new = _layout(0, "ab"), _layout(1, "abc")
    plan = TransferPlan.between(old, new)
    connected = threading.Barrier(len(plan.workers))

    def run(peers: PeerGroup) -> None:
        connected.wait(PATIENCE_S)  # one that closes earlier would be lost while the others still connect
        if peers.me == "c":
            peers.close()
            return
        held, memory = _memory(old, peers.me, fill=True), _memory(new, peers.me, fill=False)
        with pytest.raises(RuntimeError):
            execute_transfer(plan, peers.me, held, memory, peers)
        assert _same(held, _memory(old, peers.me, fill=True))

    on_peers(plan.workers, run)


def test_a_worker_without_the_memory_that_the_plan_needs_fails_with_the_reason() -> None:
    plan = TransferPlan.between(_layout(0, "a"), _layout(1, "a"))

    def run(peers: PeerGroup) -> None:
        with pytest.raises(RuntimeError, match="no member of"):
            execute_transfer(plan, "a", None, None, peers)

    on_peers(("a",), run)
