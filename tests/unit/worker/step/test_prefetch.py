"""Rows read ahead are those that would have been read in line; whatever doesn't fit is dropped."""

import errno
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.data.bucket_store import open_store, upload
from orchestrator.data.store import TokenStore
from orchestrator.sampling.chunks import Spans
from orchestrator.sampling.micro_batches import MicroBatchSize
from orchestrator.sampling.sample_order import RowOrder
from orchestrator.sampling.sampler import SamplerState
from orchestrator.sampling.token_stream import TokenStream
from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends import location
from orchestrator.storage.backends.bucket_url import BucketUrl
from orchestrator.storage.backends.patience import Patience
from orchestrator.storage.condition import StorageCondition, StorageTrouble
from orchestrator.worker.step import prefetch as module
from orchestrator.worker.step.batches import StepBatches
from orchestrator.worker.step.prefetch import Prefetch, StepsAhead, Wanted
from orchestrator.worker.step.token_batches import TokenBatches
from tests.support.request_proxy import RequestFault, RequestProxy
from tests.unit.data.stores import write_store

PATIENCE_S = 60.0
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
    """A feed that notes what is read, and where. Reads of `bad_step` meet these errors, one each; those of `held_step`
    wait until it is released."""

    is_local = True

    def __init__(self, bad_step: int = -1, *errors: Exception, held_step: int = -1) -> None:
        self.order = RowOrder(SamplerState(0, 4, 8, 100))
        self.asked: list[Asked] = []
        self.bad_step, self._errors = bad_step, list(errors)
        self.held_step, self.release = held_step, threading.Event()
        self._changed = threading.Condition()

    def step(self, step: int, rank: int, world_size: int, size: MicroBatchSize) -> StepBatches:
        with self._changed:
            name = threading.current_thread().name
            self.asked.append(Asked(step, rank, world_size, size, name, self.order.state.seed))
            self._changed.notify_all()
        if step == self.held_step:
            assert self.release.wait(PATIENCE_S)
        if step == self.bad_step and self._errors:
            raise self._errors.pop(0)
        return StepBatches((), 0, self.order.state.seed, 0, step, world_size)

    def await_asked(self, step: int) -> Asked:
        """The read of this step, once it has begun."""
        with self._changed:
            assert self._changed.wait_for(lambda: any(a.step == step for a in self.asked), PATIENCE_S)
            return next(a for a in self.asked if a.step == step)


class Hook:
    """Notes troubles that it is called with, but for repeats; from `stops_at` on it stops the wait."""

    def __init__(self, stops_at: StorageCondition | None = None) -> None:
        self.heard: list[StorageTrouble | None] = []
        self.stops_at = stops_at

    def __call__(self, trouble: StorageTrouble | None) -> None:
        if self.heard[-1:] != [trouble]:
            self.heard.append(trouble)
        if trouble is not None and trouble.condition is self.stops_at:
            raise InterruptedWait


class InterruptedWait(Exception):
    pass


def _ignore(trouble: StorageTrouble | None) -> None:
    pass


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def prefetch(recorder: Recorder) -> Iterator[Prefetch]:
    ahead = Prefetch(recorder, num_steps=20)  # type: ignore[arg-type]
    yield ahead
    ahead.close()


def test_each_step_is_read_once_and_in_the_thread(recorder: Recorder, prefetch: Prefetch) -> None:
    for step in range(20):
        assert prefetch.step(step, 0, 2, TWO, _ignore).first_position == step
    assert [a.step for a in recorder.asked] == list(range(20))  # none beyond the last
    assert {a.thread.rpartition("_")[0] for a in recorder.asked} == {"rows"}


def test_each_world_gets_its_own_rows(recorder: Recorder, prefetch: Prefetch) -> None:
    prefetch.step(3, 1, 2, TWO, _ignore)
    recorder.await_asked(4)
    assert prefetch.step(4, 1, 3, TWO, _ignore).num_positions == 3
    assert prefetch.step(5, 1, 3, TWO, _ignore).num_positions == 3
    assert [a.world_size for a in recorder.asked if a.step == 4] == [2, 3]


def test_rows_of_smaller_micro_batches_are_read_again(recorder: Recorder, prefetch: Prefetch) -> None:
    prefetch.step(3, 0, 2, TWO, _ignore)
    recorder.await_asked(4)
    prefetch.step(4, 0, 2, ONE, _ignore)
    assert [a.micro_batch.rows for a in recorder.asked if a.step == 4] == [2, 1]


def test_another_order_of_rows_drops_what_was_read(recorder: Recorder, prefetch: Prefetch) -> None:
    prefetch.step(3, 0, 1, TWO, _ignore)
    recorder.await_asked(4)
    recorder.order = RowOrder(replace(recorder.order.state, seed=7))
    assert prefetch.step(4, 0, 1, TWO, _ignore).global_units == 7


def test_an_error_in_the_thread_is_raised_where_the_rows_are_wanted() -> None:
    prefetch = Prefetch(Recorder(2, ValueError("no such row")), num_steps=20)  # type: ignore[arg-type]
    prefetch.step(1, 0, 1, TWO, _ignore)
    with pytest.raises(ValueError, match="no such row"):
        prefetch.step(2, 0, 1, TWO, _ignore)
    prefetch.close()


def test_rows_that_storage_refuses_are_tried_again_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AGAIN_S", 0.01)
    hook, recorder = Hook(), Recorder(2, *[TimeoutError(errno.ETIMEDOUT, "no answer in time")] * 3)
    prefetch = Prefetch(recorder, num_steps=20)  # type: ignore[arg-type]
    prefetch.step(1, 0, 1, TWO, hook)
    assert prefetch.step(2, 0, 1, TWO, hook).first_position == 2
    assert [a.step for a in recorder.asked][:5] == [1, 2, 2, 2, 2]
    why = "the rows of step 2 can't be read: no answer in time"
    assert hook.heard == [StorageTrouble(StorageCondition.AWAY, why), None]
    prefetch.close()


def test_a_long_wait_for_rows_is_reported_and_can_be_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLOW_S", 0.2)
    hook, recorder = Hook(stops_at=StorageCondition.SLOW), Recorder(held_step=2)
    prefetch = Prefetch(recorder, num_steps=20)  # type: ignore[arg-type]
    prefetch.step(1, 0, 1, TWO, hook)
    with pytest.raises(InterruptedWait):
        prefetch.step(2, 0, 1, TWO, hook)
    assert hook.heard[-1] == StorageTrouble(StorageCondition.SLOW, "the rows of step 2 have not been read yet")
    recorder.release.set()
    assert prefetch.step(2, 0, 3, TWO, _ignore).num_positions == 3
    prefetch.close()


def test_the_thread_ends_with_the_feed(recorder: Recorder) -> None:
    prefetch = Prefetch(recorder, num_steps=20)  # type: ignore[arg-type]
    prefetch.step(0, 0, 1, TWO, _ignore)
    name = recorder.await_asked(1).thread
    thread = next(t for t in threading.enumerate() if t.name == name)
    prefetch.close()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


# -- Steps ahead, of a store in a bucket -------------------------------------------------------------------------------


class Fetches(TokenBatches):
    """Counts the fetches that have ended, and those of them that storage refused."""

    def __init__(self, job: JobSpec, store: TokenStore) -> None:
        super().__init__(job, store, torch.device("cpu"))
        self.changed, self.num_fetched, self.num_refused = threading.Condition(), 0, 0

    def fetch(self, spans: Spans) -> bool:
        try:
            done = super().fetch(spans)
        except OSError:
            with self.changed:
                self.num_refused += 1
                self.changed.notify_all()
            raise
        with self.changed:
            self.num_fetched += 1
            self.changed.notify_all()
        return done

    def await_fetched(self, number: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.num_fetched >= number, PATIENCE_S)


@pytest.fixture
def far(bucket: tuple[str, RequestProxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TokenStore:
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(location.objects_at, "__defaults__", (Patience(answer_s=30.0, retry_s=30.0),))
    place = BucketUrl(bucket[0]) / ".data" / tmp_path.name
    original = write_store(tmp_path / "original", [50_000] * 40)
    upload(original.directory, original.manifest.files, place)
    bucket[1].forget()
    return open_store(place)


def _job(**changes: object) -> JobSpec:
    train = {"max_steps": 200, "global_batch_size": 8, "micro_batch_size": 2, "sequence_length": 64}
    return JobSpec.model_validate({"schema": "v1", "name": "far", "train": train, **changes})


def test_coming_steps_need_no_bucket(far: TokenStore, proxy: RequestProxy) -> None:
    feed = Fetches(_job(), far)
    prefetch = Prefetch(feed, num_steps=200)
    prefetch.step(0, 1, 2, TWO, _ignore)
    feed.await_fetched(module.MOST_STEPS - 1)
    with proxy.failing("GET", RequestFault.FORBIDDEN):
        for step in range(1, module.MOST_STEPS):
            hook = Hook()
            prefetch.step(step, 1, 2, TWO, hook)
            assert hook.heard in ([], [None])
    prefetch.close()


def test_no_more_is_fetched_than_is_allowed_and_nothing_beyond_the_end(
    far: TokenStore, proxy: RequestProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_SPANS", 20)
    feed = Fetches(_job(), far)
    prefetch = Prefetch(feed, num_steps=11)
    prefetch.step(0, 0, 1, TWO, _ignore)
    feed.await_fetched(3)  # of 8 spans each
    prefetch.step(1, 0, 1, TWO, _ignore)
    feed.await_fetched(4)
    prefetch.step(1, 0, 2, TWO, _ignore)  # another world: anew, 4 spans a step
    feed.await_fetched(4 + 5)
    prefetch.step(10, 0, 2, TWO, _ignore)
    prefetch.close()
    assert feed.num_fetched == 9


def test_a_bucket_that_comes_back_is_fetched_from(
    far: TokenStore, proxy: RequestProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AGAIN_S", 0.01)
    feed = Fetches(_job(), far)
    ahead = StepsAhead(feed, num_steps=200)
    with proxy.failing("GET", RequestFault.FORBIDDEN):
        ahead.follow(Wanted(feed.order, 0, 0, 1, TWO))
        with feed.changed:
            assert feed.changed.wait_for(lambda: feed.num_refused > 2, PATIENCE_S)
    feed.await_fetched(module.MOST_STEPS - 1)
    ahead.close()


def test_looking_ahead_does_not_send_a_curriculum_back(
    far: TokenStore, proxy: RequestProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    begin = TokenStream._begin_epoch
    monkeypatch.setattr(TokenStream, "_begin_epoch", lambda self: (begun.append(1), begin(self))[1])
    index = far.index("train").copy()
    index["score"] = np.arange(len(index))
    monkeypatch.setattr(far, "index", lambda split: index)
    job = _job(curriculum={"signal": "length", "stages": [{"name": "all"}]})
    feed = Fetches(job, far)
    begun.clear()
    prefetch = Prefetch(feed, num_steps=200)
    for step in range(150):
        prefetch.step(step, 0, 1, TWO, _ignore)
        feed.await_fetched(min(step + module.MOST_STEPS, 200) - 1)
    prefetch.close()
    assert not begun
