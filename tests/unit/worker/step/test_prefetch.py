"""Rows read ahead are those that would have been read in line; whatever doesn't fit is dropped."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from orchestrator.sampling.micro_batches import MicroBatchSize
from orchestrator.sampling.sample_order import RowOrder
from orchestrator.sampling.sampler import SamplerState
from orchestrator.worker.step.batches import Prefetch, StepBatches

PATIENCE_S = 20.0
ONE, TWO = MicroBatchSize(rows=1), MicroBatchSize(rows=2)


@dataclass(frozen=True)
class Asked:
    step: int
    rank: int
    world_size: int
    micro_batch: MicroBatchSize
    thread: str
    seed: int


class Recorder:
    """A feed that notes what is read, and where; `bad_step` can't be read."""

    def __init__(self, bad_step: int | None = None) -> None:
        self.order = RowOrder(SamplerState(0, 4, 8, 100))
        self.asked: list[Asked] = []
        self.bad_step = bad_step
        self._changed = threading.Condition()

    def step(self, step: int, rank: int, world_size: int, size: MicroBatchSize) -> StepBatches:
        with self._changed:
            name = threading.current_thread().name
            self.asked.append(Asked(step, rank, world_size, size, name, self.order.state.seed))
            self._changed.notify_all()
        if step == self.bad_step:
            raise OSError("the disk is gone")
        return StepBatches((), 0, self.order.state.seed, step, world_size)

    def await_asked(self, step: int) -> Asked:
        """The read of this step, once it has begun."""
        with self._changed:
            assert self._changed.wait_for(lambda: any(a.step == step for a in self.asked), PATIENCE_S)
            return next(a for a in self.asked if a.step == step)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def prefetch(recorder: Recorder) -> Iterator[Prefetch]:
    ahead = Prefetch(recorder, num_steps=20)  # type: ignore[arg-type]
    yield ahead
    ahead.close()


def test_each_step_is_read_once_and_all_but_the_first_in_the_thread(recorder: Recorder, prefetch: Prefetch) -> None:
    for step in range(20):
        assert prefetch.step(step, 0, 2, TWO).first_position == step
    assert [a.step for a in recorder.asked] == list(range(20))  # none beyond the last
    assert recorder.asked[0].thread == threading.current_thread().name
    assert {a.thread.rpartition("_")[0] for a in recorder.asked[1:]} == {"rows"}


def test_another_world_gets_rows_of_its_own(recorder: Recorder, prefetch: Prefetch) -> None:
    prefetch.step(3, 1, 2, TWO)
    recorder.await_asked(4)
    assert prefetch.step(4, 1, 3, TWO).num_positions == 3
    assert prefetch.step(5, 1, 3, TWO).num_positions == 3
    assert [a.world_size for a in recorder.asked if a.step == 4] == [2, 3]


def test_smaller_slots_are_read_anew(recorder: Recorder, prefetch: Prefetch) -> None:
    prefetch.step(3, 0, 2, TWO)
    recorder.await_asked(4)
    prefetch.step(4, 0, 2, ONE)
    assert [a.micro_batch.rows for a in recorder.asked if a.step == 4] == [2, 1]


def test_another_order_of_rows_drops_what_was_read(recorder: Recorder, prefetch: Prefetch) -> None:
    prefetch.step(3, 0, 1, TWO)
    recorder.await_asked(4)
    recorder.order = RowOrder(replace(recorder.order.state, seed=7))
    assert prefetch.step(4, 0, 1, TWO).global_tokens == 7


def test_an_error_in_the_thread_is_raised_where_the_rows_are_wanted() -> None:
    prefetch = Prefetch(Recorder(bad_step=2), num_steps=20)  # type: ignore[arg-type]
    prefetch.step(1, 0, 1, TWO)
    with pytest.raises(OSError, match="the disk is gone"):
        prefetch.step(2, 0, 1, TWO)
    prefetch.close()


def test_the_thread_ends_with_the_feed(recorder: Recorder) -> None:
    prefetch = Prefetch(recorder, num_steps=20)  # type: ignore[arg-type]
    prefetch.step(0, 0, 1, TWO)
    name = recorder.await_asked(1).thread
    thread = next(t for t in threading.enumerate() if t.name == name)
    prefetch.close()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
