import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import ProtocolError
from orchestrator.sampling.micro_batches import micro_batches_of
from orchestrator.sampling.sampler import SamplerState, sample

STATE = SamplerState(seed=3, global_batch_size=4, sequence_length=64, num_rows=7)


@given(num_rows=st.integers(1, 50), global_batch_size=st.integers(1, 20), seed=st.integers(0, 2**64))
def test_every_epoch_holds_every_row_once(num_rows: int, global_batch_size: int, seed: int) -> None:
    state = SamplerState(seed, global_batch_size, sequence_length=8, num_rows=num_rows)
    num_steps = -(-3 * num_rows // global_batch_size)
    rows = np.concatenate([sample(state, step) for step in range(num_steps)])
    for epoch in range(3):
        assert sorted(rows[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))


def test_the_order_through_4_2_3_ranks_equals_that_of_one() -> None:
    state = SamplerState(seed=1, global_batch_size=12, sequence_length=8, num_rows=100)
    micro_batch_size, num_micro_batches = 2, 6

    def consumed(world_sizes: list[int]) -> list[int]:
        order: list[int] = []
        for step, world_size in enumerate(world_sizes):
            rows = sample(state, step).reshape(num_micro_batches, micro_batch_size)
            for rank in range(world_size):
                for micro_batch in micro_batches_of(rank, world_size, num_micro_batches):
                    order.extend(rows[micro_batch].tolist())
        return order

    assert consumed([4] * 10 + [2] * 10 + [3] * 10) == consumed([1] * 30)


def test_step_of_the_far_future_needs_no_past() -> None:
    rows = sample(STATE, 10**12)
    assert len(set(rows.tolist())) >= 3  # four rows in a row of at most two epochs of 7


def test_negative_step_is_refused() -> None:
    with pytest.raises(ValueError, match="step -1"):
        sample(STATE, -1)


def test_json_gives_the_same_state_back() -> None:
    assert SamplerState.from_json(STATE.to_json()) == STATE


def changed(**changes: Any) -> str:
    return json.dumps({**json.loads(STATE.to_json()), **changes})


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="nothing"),
        pytest.param("null", id="null"),
        pytest.param('{"seed": 1}', id="fields missing"),
        pytest.param(changed(position=3), id="field of another version"),
        pytest.param(changed(seed="3"), id="text for a number"),
        pytest.param(changed(global_batch_size=True), id="true for a number"),
        pytest.param(changed(global_batch_size=0), id="no rows in a step"),
        pytest.param(changed(num_rows=0), id="no rows in an epoch"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError, match="sampler state doesn't fit"):
        SamplerState.from_json(text)
