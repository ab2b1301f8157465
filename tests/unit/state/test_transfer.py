"""How moves become messages."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.state.transfer import chunks

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
