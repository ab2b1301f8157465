"""Members of runs on real Ray are killed at every moment; workers are simulated, everything else is the product's."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint.manifest import MANIFEST_FILE
from orchestrator.checkpoint.read import CheckpointReader
from orchestrator.protocol.status import RunPhase, RunStatus
from orchestrator.run_records.checkpoints.search import path_of
from orchestrator.run_records.run_files import RunFiles
from tests.support.control import UNHURRIED, Cluster, kill_at_once
from tests.support.simulated_services import newcomers_held

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture
def on(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def _steps(steps: int) -> dict[str, Any]:
    return {"max_steps": steps, "global_batch_size": 16, "micro_batch_size": 4}


def _four(on: Cluster, name: str, steps: int = 300, **changes: Any) -> dict[str, int]:
    """A run of four members, and their process ids."""
    workers = {"min": 1, "max": 4, "initial": 4}
    on.submit(name, **({"workers": workers, "train": _steps(steps)} | changes))
    on.until(name, lambda s: s.step > 5)
    return {worker: on.pid_of(f"{name}/worker/{worker}") for worker in ("w0", "w1", "w2", "w3")}


def _ended_well(on: Cluster, name: str, steps: int = 300) -> RunStatus:
    status = on.end_of(name, hurried=True)
    assert status.phase is RunPhase.SUCCEEDED, (status.error, status.traceback)
    on.assert_every_step_once(name, steps)
    on.assert_nothing_left(name, [])
    return status


@pytest.mark.parametrize(
    "victims",
    [pytest.param(("w2",), marks=pytest.mark.slow), pytest.param(("w0",), marks=pytest.mark.slow), ("w0", "w2")],
    ids=str,
)
def test_survivors_continue_and_lost_workers_are_replaced(on: Cluster, victims: tuple[str, ...]) -> None:
    name = "lost-" + "-".join(victims)
    pids = _four(on, name)
    kill_at_once(pids[victim] for victim in victims)
    on.until(name, lambda s: bool(s.recoveries) and s.workers_now == 4)
    status = _ended_well(on, name)
    (recovery,) = status.recoveries
    assert set(recovery.lost) == set(victims) and (recovery.cause, recovery.source) == ("worker", "memory")
    assert (recovery.from_size, recovery.to_size) == (4, 4 - len(victims))
    assert recovery.steps_lost == 0 and recovery.steps_replayed <= 1
    assert on.sizes(name)[-1] == 4
    assert {"generation_aborted", "worker_lost", "recovered"} <= set(on.kinds(name))


@pytest.mark.parametrize(
    "victims",
    [("w1", "w2"), pytest.param(("w0", "w1", "w2", "w3"), marks=pytest.mark.slow)],
    ids=["with its buddy", "all"],
)
def test_without_a_whole_state_in_memory_the_newest_checkpoint_serves(on: Cluster, victims: tuple[str, ...]) -> None:
    name = f"disk-{len(victims)}"
    pids = _four(on, name, checkpoint={"every": 10})
    on.until(name, lambda s: s.checkpoint_step is not None)
    kill_at_once(pids[victim] for victim in victims)
    on.until(name, lambda s: bool(s.recoveries))
    status = _ended_well(on, name)
    assert status.recoveries[0].source == "checkpoint" and status.recoveries[0].step % 10 == 9
    assert "rolled_back" in on.kinds(name)


def _back_behind_a_checkpoint(on: Cluster, name: str, every: int) -> Path:
    """Let a run lose all its memory and its newest checkpoint, the second one at least. Returns that checkpoint."""
    pids = _four(on, name, checkpoint={"every": every})
    on.until(name, lambda s: s.checkpoint_step is not None and s.checkpoint_step >= 2 * every - 1)
    for pid in pids.values():
        os.kill(pid, signal.SIGSTOP)  # no newer one is written meanwhile
    run_dir = on.storage / name
    newest = path_of(run_dir, RunFiles(run_dir).checkpoints()[-1])
    shard = next(newest.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)
    on.until(name, lambda s: bool(s.recoveries))
    return newest


@pytest.mark.slow
def test_a_corrupt_checkpoint_is_passed_over(on: Cluster) -> None:
    newest = _back_behind_a_checkpoint(on, "corrupt", every=10)
    after = _ended_well(on, "corrupt")
    assert after.recoveries[0].source == "checkpoint" and f"step-{after.recoveries[0].step:08d}" < newest.name


def test_a_lone_worker_publishes_what_a_checkpoint_includes_and_its_loss_repeats_no_published_step(on: Cluster) -> None:
    name, every, envs = "alone", 60, {"SIM_STEP_S": "0.1"}  # six seconds between checkpoints, to look and to kill
    protection, checkpoint = {"publish": "committed"}, {"every": every}
    on.submit(name, workers=1, train=_steps(200), protection=protection, checkpoint=checkpoint, envs=envs)
    status = on.until(name, lambda s: s.uncommitted > 2)
    assert (status.step, status.loss, status.held_by) == (0, None, 1)
    pid = on.pid_of(f"{name}/worker/w0")
    status = on.until(name, lambda s: s.step > 0 and 10 < s.uncommitted < every - 20)
    os.kill(pid, signal.SIGKILL)
    assert status.step % every == 0 and status.checkpoint_step == status.step - 1
    (recovery,) = on.until(name, lambda s: bool(s.recoveries)).recoveries
    assert recovery.source == "checkpoint" and recovery.step >= status.step - 1
    assert recovery.steps_replayed > 10 and recovery.steps_lost == 0
    assert _ended_well(on, name, 200).uncommitted == 0


@pytest.mark.slow
def test_a_pause_behind_a_checkpoint_of_the_abandoned_past_writes_one(on: Cluster) -> None:
    newest = _back_behind_a_checkpoint(on, "behind", every=40)
    on.ask("pause", "behind")
    status = on.end_of("behind")
    assert status.phase is RunPhase.PAUSED and status.recoveries[0].source == "checkpoint", status
    checkpoint = Path(str(status.checkpoint))
    run_dir = newest.parents[1]
    assert checkpoint < newest and path_of(run_dir, RunFiles(run_dir).checkpoints()[-1]) == checkpoint
    with CheckpointReader(checkpoint) as reader:
        reader.verify()
        # Generation 1 was to begin from the newest checkpoint, in which its workers found the damage.
        assert reader.manifest.generation == 2 and f"after {reader.manifest.step + 1} of 300 steps" in status.why
    assert (newest / MANIFEST_FILE).exists()  # set aside, not deleted


def test_below_the_least_number_of_workers_the_run_waits_and_its_status_shows_it(on: Cluster) -> None:
    workers = {"min": 3, "max": 3, "initial": 3}
    on.submit("least", workers=workers, train=_steps(200), resources={"cpus": 1.25})
    on.until("least", lambda s: s.step > 5)
    on.submit("other", workers=1, resources={"cpus": 0.25}, train=_steps(100_000))
    with newcomers_held(on.storage / "least"):
        os.kill(on.pid_of("least/worker/w1"), signal.SIGKILL)
        status = on.until("least", lambda s: "workers.min" in s.why)
    assert status.phase is RunPhase.RECOVERING and "w1 died" in status.why
    assert "waits for 1 more worker: 2 are there, workers.min is 3" in status.why
    on.until("least", lambda s: bool(s.recoveries))
    assert on.sizes("least")[-1] == 3
    on.ask("stop", "other")
    _ended_well(on, "least", 200)


@pytest.mark.slow
def test_a_member_lost_in_a_rescale(on: Cluster) -> None:
    workers = {"min": 1, "max": 4, "initial": 3, "standby": 1}
    on.submit("between", train=_steps(400), workers=workers)
    on.until("between", lambda s: s.step > 5 and s.standbys == 1)
    pid = on.pid_of(f"between/worker/{on.members('between')[1]}")
    on.ask("scale", "between", 4)
    os.kill(pid, signal.SIGKILL)
    status = on.until("between", lambda s: bool(s.recoveries) and s.workers_now == 4)  # it may die after the rescale
    assert [r.steps_lost for r in status.recoveries] == [0]
    _ended_well(on, "between", 400)


@pytest.mark.slow
def test_a_death_while_the_run_recovers_from_another(on: Cluster) -> None:
    pids = _four(on, "twice", envs={**UNHURRIED, "SIM_DIE": "w3:moving-on"})
    os.kill(pids["w1"], signal.SIGKILL)
    on.until("twice", lambda s: bool(s.recoveries))
    status = _ended_well(on, "twice")
    assert set(status.recoveries[0].lost) == {"w1", "w3"}
    assert status.recoveries[0].steps_lost == 0


def test_a_frozen_member_is_found_and_removed(on: Cluster) -> None:
    pids = _four(on, "frozen")
    os.kill(pids["w2"], signal.SIGSTOP)
    on.until("frozen", lambda s: bool(s.recoveries))
    status = _ended_well(on, "frozen")
    (recovery,) = status.recoveries
    assert (recovery.lost, recovery.cause, recovery.steps_lost) == (("w2",), "hang", 0)
    on.assert_nothing_left("frozen", list(pids.values()))
