from pathlib import Path
from typing import Any

import pytest
from ray.train import BackendConfig, DataConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.v2._internal.execution.context import TrainRunContext

from orchestrator.protocol.events.run import Resumed
from orchestrator.protocol.events.training import CheckpointCommitted
from orchestrator.ray_train.callbacks import CallbackError, Follower
from orchestrator.run_records.journaled_run import JournaledRun
from orchestrator.storage.tasks import run_inline
from tests.unit.policy.imagined import Life, limits_of, record

LIMITS = limits_of(steps=30)
CONTEXT = TrainRunContext(
    run_config=RunConfig(name="try"),
    train_loop_config=None,
    scaling_config=ScalingConfig(),
    backend_config=BackendConfig(),
    dataset_config=DataConfig(),
)


class RecordingCallback(UserCallback):
    def __init__(self) -> None:
        self.reports: list[tuple[int, int, str | None]] = []
        self.rows: list[dict[str, Any]] = []
        self.exceptions: list[dict[int, str]] = []

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        self.reports.append((metrics[0]["step"], len(metrics), checkpoint and checkpoint.path))
        self.rows.append(metrics[0])

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self.exceptions.append({rank: str(error) for rank, error in worker_exceptions.items()})


def memory_of(run_dir: Path) -> JournaledRun:
    return JournaledRun(run_dir, LIMITS)


def follower_of(run_dir: Path, *callbacks: UserCallback) -> Follower:
    return Follower(run_dir, callbacks, CONTEXT)


def test_each_step_is_reported_once_from_now_on(tmp_path: Path) -> None:
    memory, recorded = memory_of(tmp_path), RecordingCallback()
    run_inline(memory.absorb([record(0), record(1)], up_to=100))
    follower = follower_of(tmp_path, recorded)
    follower.read_on()
    run_inline(memory.absorb([record(2), record(3, world_size=3)], up_to=100))
    follower.read_on()
    follower.read_on()
    assert recorded.reports == [(2, 2, None), (3, 3, None)]
    assert [row["train/tokens"] for row in recorded.rows] == [300, 400]  # those before it are counted


def test_a_run_that_has_not_begun_can_be_followed(tmp_path: Path) -> None:
    recorded = RecordingCallback()
    follower = follower_of(tmp_path / "run", recorded)
    (tmp_path / "run").mkdir()
    follower.read_on()
    run_inline(memory_of(tmp_path / "run").absorb([record(0)], up_to=100))
    follower.read_on()
    assert recorded.reports == [(0, 2, None)]


def test_a_checkpoint_is_reported_with_its_step_even_if_that_comes_later(tmp_path: Path) -> None:
    memory, recorded = memory_of(tmp_path), RecordingCallback()
    follower = follower_of(tmp_path, recorded)
    run_inline(memory.absorb([record(0), record(1)], up_to=100))
    run_inline(memory.note(CheckpointCommitted(0, "/c/0", 0, "")))
    run_inline(memory.note(CheckpointCommitted(2, "/c/2", 0, "")))
    follower.read_on()
    assert recorded.reports == [(0, 2, None), (1, 2, None), (0, 2, "/c/0")]
    run_inline(memory.absorb([record(2)], up_to=100))
    follower.read_on()
    assert recorded.reports[3:] == [(2, 2, None), (2, 2, "/c/2")] and recorded.rows[4] == recorded.rows[3]


def test_steps_that_are_done_again_after_a_resume_are_reported_again(tmp_path: Path) -> None:
    memory, recorded = memory_of(tmp_path), RecordingCallback()
    follower = follower_of(tmp_path, recorded)
    run_inline(memory.absorb([record(step) for step in range(4)], up_to=100))
    run_inline(memory.decided(memory.state, [Resumed("t", 1, "/c/1", 2)]))
    run_inline(memory.absorb([record(2), record(3)], up_to=100))
    follower.read_on()
    assert [step for step, _, _ in recorded.reports] == [0, 1, 2, 3, 2, 3]
    assert recorded.rows[4]["train/tokens"] == recorded.rows[2]["train/tokens"]


def test_a_lost_worker_is_reported_by_rank_until_the_next_step(tmp_path: Path) -> None:
    memory, recorded, life = memory_of(tmp_path), RecordingCallback(), Life(LIMITS)
    follower = follower_of(tmp_path, recorded)

    def live_until(condition: Any) -> None:
        while not condition():
            life.tick()
            run_inline(memory.decided(life.state, []))
            run_inline(
                memory.absorb([r for r in life.progress.recent if r.step > memory.progress.watermark], up_to=100)
            )
        follower.read_on()

    live_until(lambda: life.step >= 3)
    assert recorded.exceptions == []
    life.kill("w1")
    live_until(lambda: bool(life.state.failures.recent))
    (failed,) = recorded.exceptions
    assert list(failed) == [1] and failed[1].startswith("w1 died")
    assert list(follower.failures) == [1]
    lost_at = life.step
    live_until(lambda: life.progress.watermark > lost_at + 2)
    assert follower.failures == {} and len(recorded.exceptions) == 1


def test_an_error_of_a_callback_is_reported_with_its_name(tmp_path: Path) -> None:
    class Broken(UserCallback):
        def after_report(self, run_context: Any, metrics: Any, checkpoint: Any) -> None:
            raise LookupError("no")

    follower = follower_of(tmp_path, Broken())
    run_inline(memory_of(tmp_path).absorb([record(0)], up_to=100))
    with pytest.raises(CallbackError, match=r"Broken\.after_report failed: LookupError") as failed:
        follower.read_on()
    assert isinstance(failed.value.raised, LookupError)
