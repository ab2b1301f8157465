import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import ProtocolError
from orchestrator.sampling.micro_batches import micro_batches_of
from orchestrator.sampling.sampler import SamplerState, Stage, sample

TWO_STAGES = SamplerState(
    seed=3,
    global_batch_size=4,
    stages=(Stage("short", 0, 64, 10, 0), Stage("long", 5, 128, 7, 20)),
)


@given(num_rows=st.integers(1, 50), global_batch_size=st.integers(1, 20), seed=st.integers(0, 2**64))
def test_every_epoch_holds_every_row_once(num_rows: int, global_batch_size: int, seed: int) -> None:
    state = SamplerState.of_one_stage(seed, global_batch_size, sequence_length=8, num_rows=num_rows)
    num_steps = -(-3 * num_rows // global_batch_size)
    batches = [sample(state, step) for step in range(num_steps)]
    positions = np.concatenate([batch.positions for batch in batches])
    epochs = np.concatenate([batch.epochs for batch in batches])
    rows = np.concatenate([batch.rows for batch in batches])
    assert np.array_equal(positions, np.arange(num_steps * global_batch_size))
    for epoch in range(3):
        assert sorted(rows[epochs == epoch]) == list(range(num_rows))


def test_a_batch_may_straddle_epochs() -> None:
    state = SamplerState.of_one_stage(seed=0, global_batch_size=4, sequence_length=8, num_rows=6)
    assert sample(state, 1).epochs.tolist() == [0, 0, 1, 1]


def test_the_order_through_4_2_3_ranks_equals_that_of_one() -> None:
    state = SamplerState.of_one_stage(seed=1, global_batch_size=12, sequence_length=8, num_rows=100)
    micro_batch_size, num_micro_batches = 2, 6

    def consumed(world_sizes: list[int]) -> list[int]:
        order: list[int] = []
        for step, world_size in enumerate(world_sizes):
            rows = sample(state, step).rows.reshape(num_micro_batches, micro_batch_size)
            for rank in range(world_size):
                for micro_batch in micro_batches_of(rank, world_size, num_micro_batches):
                    order.extend(rows[micro_batch].tolist())
        return order

    assert consumed([4] * 10 + [2] * 10 + [3] * 10) == consumed([1] * 30)


def test_a_step_belongs_to_the_newest_stage_begun() -> None:
    assert [sample(TWO_STAGES, step).stage.name for step in (0, 4, 5, 100)] == ["short", "short", "long", "long"]


def test_positions_run_on_through_stages_and_epochs_start_anew() -> None:
    last, first = sample(TWO_STAGES, 4), sample(TWO_STAGES, 5)
    assert last.positions.tolist() == [16, 17, 18, 19]
    assert first.positions.tolist() == [20, 21, 22, 23]
    assert first.first_position == 20
    assert first.epochs.tolist() == [0, 0, 0, 0]
    assert sample(TWO_STAGES, 6).epochs.tolist() == [0, 0, 0, 1]
    assert sample(TWO_STAGES, 6).rows.max() < 7


def test_step_of_the_far_future_needs_no_past() -> None:
    batch = sample(TWO_STAGES, 10**12)
    assert batch.first_position == 4 * 10**12
    assert len(set(batch.rows.tolist())) >= 3  # four rows in a row of at most two epochs of 7


def test_negative_step_is_refused() -> None:
    with pytest.raises(ValueError, match="step -1"):
        sample(TWO_STAGES, -1)


def test_json_gives_the_same_state_back() -> None:
    assert SamplerState.from_json(TWO_STAGES.to_json()) == TWO_STAGES


def changed(**changes: Any) -> str:
    return json.dumps({**json.loads(TWO_STAGES.to_json()), **changes})


def stage(**changes: Any) -> dict[str, Any]:
    return {
        "name": "all",
        "first_step": 0,
        "sequence_length": 8,
        "num_rows": 5,
        "first_position": 0,
        **changes,
    }


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
        pytest.param(changed(global_batch_size=5), id="stages of another batch size"),
        pytest.param(changed(stages=[]), id="no stage"),
        pytest.param(changed(stages=[3]), id="a stage that is none"),
        pytest.param(changed(stages=[stage(extra=1)]), id="unknown field of a stage"),
        pytest.param(changed(stages=[stage(first_step=1)]), id="a beginning left out"),
        pytest.param(changed(stages=[stage(num_rows=0)]), id="stage without rows"),
        pytest.param(changed(stages=[stage(), stage()]), id="a stage twice"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError, match="sampler state doesn't fit"):
        SamplerState.from_json(text)
