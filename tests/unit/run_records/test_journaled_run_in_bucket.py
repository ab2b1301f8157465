"""A run as its controller keeps it, in a bucket that fails now and then."""

import random
from itertools import count

import pytest

from orchestrator.errors import StorageError, TermSuperseded
from orchestrator.policy.state.requests import resumed
from orchestrator.protocol.events.base import Event
from orchestrator.protocol.events.run import Submitted
from orchestrator.protocol.messages import Restore, ResumeRequest
from orchestrator.run_records.final_status import has_ended
from orchestrator.run_records.journaled_run import JournaledRun, open_journal
from orchestrator.run_records.run_history import read_steps, user_events
from orchestrator.storage.backends import location as locations
from orchestrator.storage.backends.bucket_url import BucketUrl
from orchestrator.storage.backends.location import objects_at
from orchestrator.storage.backends.patience import Patience
from orchestrator.storage.compaction import CompactionLimits
from orchestrator.storage.condition import StorageCondition
from orchestrator.storage.storage_process import StorageProcess
from orchestrator.storage.tasks import run_inline
from tests.support.request_proxy import RequestFault, RequestProxy
from tests.unit.policy.imagined import limits_of, record

LIMITS = limits_of(steps=100_000)
COMPACTION = CompactionLimits(entries=8, num_bytes=2**20, merged=2)
number = count()


@pytest.fixture
def run_dir(bucket: tuple[str, RequestProxy]) -> BucketUrl:
    return BucketUrl(bucket[0]) / f"memory-{next(number)}" / "demo"


def opened(run_dir: BucketUrl) -> JournaledRun:
    return JournaledRun(run_dir, LIMITS, compaction=COMPACTION)


def train(memory: JournaledRun, num_steps: int) -> None:
    """Journal so many steps, one by one, and compact the journal when that is due."""
    for _ in range(num_steps):
        run_inline(memory.absorb([record(memory.progress.watermark + 1)], up_to=10**9))
        while memory.compactor.is_due():
            run_inline(memory.compactor.advance())


def test_a_successor_continues_where_the_run_was(run_dir: BucketUrl, proxy: RequestProxy) -> None:
    first = opened(run_dir)
    run_inline(first.note(Submitted("demo", 2)))
    train(first, 40)
    second = opened(run_dir)
    assert (first.term, second.term, second.progress) == (1, 2, first.progress)
    assert second.compacted > 20  # it has read a state, and few entries
    with pytest.raises(TermSuperseded):
        train(first, 1)
    train(second, 3)
    assert [step.step for step in read_steps(run_dir)] == list(range(43))
    assert [event["kind"] for event in user_events(run_dir)] == ["submitted"]


def test_a_run_goes_back_to_a_checkpoint(run_dir: BucketUrl, proxy: RequestProxy) -> None:
    memory = opened(run_dir)
    train(memory, 20)
    decision = resumed(LIMITS, memory.state, ResumeRequest("again", Restore(11, f"{run_dir}/checkpoints/11")))
    events = [action for action in decision.actions if isinstance(action, Event)]
    run_inline(memory.decided(decision.state, events))
    assert memory.progress.watermark == 11 and opened(run_dir).progress == memory.progress
    assert [step.step for step in read_steps(run_dir)] == list(range(12))


def test_its_end_is_on_record(run_dir: BucketUrl, proxy: RequestProxy) -> None:
    memory = opened(run_dir)
    assert not has_ended(run_dir)
    proxy.fail("PUT", RequestFault.LOST_REPLY)
    run_inline(memory.conclude("{}"))
    assert has_ended(run_dir) and "status-0000000001.json" in objects_at(run_dir).names("")


@pytest.mark.parametrize(
    ("fault", "condition", "words"),
    [
        (RequestFault.UNAVAILABLE, StorageCondition.SLOW, "503 Service Unavailable (SlowDown)"),
        (RequestFault.FORBIDDEN, StorageCondition.READ_ONLY, "403 Forbidden (AccessDenied)"),
        (RequestFault.STALL, StorageCondition.AWAY, "no answer in time"),
        (RequestFault.LOST_REQUEST, StorageCondition.AWAY, "the request failed"),
    ],
    ids=str,
)
def test_a_failing_write_changes_nothing_and_shows_the_condition(
    run_dir: BucketUrl,
    proxy: RequestProxy,
    monkeypatch: pytest.MonkeyPatch,
    fault: RequestFault,
    condition: StorageCondition,
    words: str,
) -> None:
    short = Patience(answer_s=3.0, upload_s=5.0, retry_s=0.3)
    make = locations.objects_at
    monkeypatch.setattr("orchestrator.storage.backends.signing_keys.objects_at", lambda place: make(place, short))
    memory = opened(run_dir)
    train(memory, 2)
    with proxy.failing("PUT", fault), pytest.raises(StorageError, match="run storage can't be written"):
        train(memory, 1)
    assert memory.progress.watermark == 1
    assert memory.trouble is not None and memory.trouble.condition is condition
    assert memory.trouble.why == f"run storage can't be written: {words}"
    train(memory, 1)
    assert memory.trouble is None and [step.step for step in read_steps(run_dir)] == [0, 1, 2]


def test_a_child_process_makes_the_calls_of_a_controller(run_dir: BucketUrl, proxy: RequestProxy) -> None:
    process = StorageProcess("bucket")
    memory = JournaledRun(run_dir, LIMITS, open_journal(run_dir, caller=process.call), caller=process.call)
    chance = random.Random(3)
    for _ in range(20):
        proxy.fail("PUT", chance.choice([None, RequestFault.LOST_REPLY, RequestFault.LATE_DUPLICATE]))
        train(memory, 1)
    assert [step.step for step in read_steps(run_dir)] == list(range(20))
    process.close()
