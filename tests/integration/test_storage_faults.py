"""Run storage that fills up or hangs under a run on a real cluster: no worker is lost, no step, and the bits are the
same."""

import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from orchestrator.client import OrchestratorClient
from orchestrator.cluster.actors import names_of
from orchestrator.cluster.published.status_reader import published_status
from orchestrator.errors import NotFinished, UsageError
from orchestrator.protocol.status import RunPhase, RunStatus
from orchestrator.protocol.step_record import StepRecord
from orchestrator.run_records.run_files import RunFiles
from orchestrator.run_records.run_history import read_steps
from orchestrator.spec.fault_tolerance import CheckpointSpec
from orchestrator.spec.job import JobSpec
from orchestrator.spec.task import TaskSpec
from orchestrator.spec.workers import WorkersSpec
from orchestrator.storage.backends.location import objects_at
from orchestrator.storage.chain_reader import newest_term
from orchestrator.storage.condition import StorageCondition
from orchestrator.storage.reserve import RESERVE_BYTES, reserve_in
from tests.support.calm_runs import assert_same_tensors, calm_run, tensors_of
from tests.support.disk import ext4_disk, fill, frozen, small_disk, unmounted
from tests.support.hanging_disk import hanging_disk
from tests.support.hosts import until as await_event
from tests.support.real_runs import until
from tests.support.texts import small_job
from tests.support.worker_processes import is_alive, until_workers

pytestmark = [pytest.mark.ray, pytest.mark.journey, pytest.mark.timeout(700)]

DISK_MB = 34
ENDLESS = 1_000_000  # steps of runs that are stopped
GAP_S = 10.0  # between two steps, at most
PROCESS = "orchestrator.storage.storage_process"
HANGS_S = 75.0  # longer than a worker waits for its controller
SOON_S = 2.0  # for a request, whatever storage does
USER_CODE = Path(__file__).parents[1] / "support" / "user_code"
DELAY_S = 0.05  # of a micro-batch, of which a run of one worker has five per step
MOST_TROUBLES = 3  # events of it while storage fails once: on a busy machine it is slow by itself


def _job(texts: Path, name: str, storage: Path, delay_s: float = DELAY_S, steps: int = ENDLESS) -> JobSpec:
    changes = {
        "task": TaskSpec(entrypoint="slow_task:slow", code_dir=str(USER_CODE), options={"delay_s": delay_s}),
        "name": name,
        "storage": str(storage),
        "workers": WorkersSpec(min=1, max=2, initial=2),
        "checkpoint": CheckpointSpec(every=10, keep_last=1),
    }
    job: JobSpec = small_job(texts, max_steps=steps, determinism="exact", lr_scheduler={"kind": "constant"})
    return job.model_copy(update=changes)


def _assert_undisturbed(status: RunStatus, texts: Path, tmp_path: Path) -> None:
    """Compare the run's tensors with those of one to which nothing happens. That has one worker and no delay, which
    must not make a difference."""
    job = _job(texts, "calm", tmp_path, delay_s=0.0)
    assert_same_tensors(status, calm_run(job, status, tmp_path / "calm"))


def _fill(client: OrchestratorClient, run: str, disk: Path) -> RunStatus:
    """Fill the disk, also with what old checkpoints free, until the run can write no checkpoint any more. It keeps what
    it has in reserve."""

    def is_full(status: RunStatus) -> bool:
        fill(disk, leave=0 if reserve_in(Path(status.run_dir)).exists() else RESERVE_BYTES)
        return "can't be written" in str(status.warning)

    return until(client, run, is_full)


def _is_behind(status: RunStatus) -> bool:
    """Whether storage is full, and has taken no checkpoint of the newest 15 steps: one may fit once an old one goes."""
    newest = status.checkpoint_step
    return status.storage is StorageCondition.FULL and newest is not None and newest < status.step - 15


def test_a_full_disk_costs_no_worker_and_no_step(client: OrchestratorClient, texts: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", DISK_MB) as disk:
        run = client.submit(_job(texts, "crowded", disk / "runs"))
        before = until(client, run, lambda s: s.step > 25 and s.checkpoint_step is not None)
        full = _fill(client, run, disk)
        later = until(client, run, lambda s: s.step > full.step + 25 and _is_behind(s))
        assert later.phase is RunPhase.TRAINING and later.recoveries == ()
        (disk / "filler").unlink()
        until(client, run, lambda s: s.warning is None and (s.checkpoint_step or 0) > later.step)
        client.stop(run)
        status = client.wait(run, timeout_s=250.0)
        assert (status.phase, status.recoveries, status.warning) == (RunPhase.STOPPED, (), None), status
        kinds = [event["kind"] for event in client.events(run)]
        storage = [kind for kind in kinds if kind.startswith("storage")]  # one checkpoint may fit once an old one goes
        assert storage in (n * ["storage_fails", "storage_works"] for n in range(1, MOST_TROUBLES + 1)), storage
        assert "worker_lost" not in kinds
        records = read_steps(Path(status.run_dir))
        assert [record.step for record in records] == list(range(status.step))
        assert before.checkpoint is not None
        run_dir = Path(status.run_dir)
        kept = {record.name for record in RunFiles(run_dir).checkpoints()}
        assert {path.name for path in (run_dir / "checkpoints").iterdir()} == kept and not (
            run_dir / ".reserve"
        ).exists()
        _assert_undisturbed(status, texts, tmp_path)


@pytest.mark.slow
def test_a_run_that_is_stopped_on_a_full_disk_ends_once_its_checkpoint_fits(
    client: OrchestratorClient, texts: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", DISK_MB) as disk:
        run = client.submit(_job(texts, "stuck", disk / "runs"))
        until(client, run, lambda s: s.step > 15)
        full = _fill(client, run, disk)
        asked_s = time.monotonic()
        client.stop(run)
        assert time.monotonic() - asked_s < SOON_S
        until(client, run, lambda s: s.phase is RunPhase.FINISHING and "can't be written" in str(s.warning))
        (disk / "filler").unlink()
        status = client.wait(run, timeout_s=250.0)
        assert status.phase is RunPhase.STOPPED and status.recoveries == (), status
        assert status.checkpoint_step == status.step - 1 and status.step > full.step
        assert tensors_of(status.checkpoint)


@pytest.mark.slow
def test_a_run_on_a_full_disk_can_be_stopped_at_once(client: OrchestratorClient, texts: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", DISK_MB) as disk:
        run = client.submit(_job(texts, "given-up", disk / "runs"))
        until(client, run, lambda s: s.step > 25 and s.checkpoint_step is not None)
        _fill(client, run, disk)
        client.stop(run)
        client.stop(run, now=True)
        status = client.wait(run, timeout_s=250.0)
        assert status.phase is RunPhase.STOPPED, status
        assert "without a checkpoint: the newest one is of step" in status.why
        assert status.checkpoint_step is not None and status.checkpoint_step < status.step - 1
        assert tensors_of(status.checkpoint)


def _longest_gap_s(records: Sequence[StepRecord], since: float, until: float) -> float:
    """The longest time between two votes of this period."""
    votes = [record.timing.vote_time for record in records if since <= record.timing.vote_time < until]
    return max(after - before for before, after in pairwise([since, *votes, until]))


@pytest.mark.slow
def test_a_run_waits_on_a_full_disk_for_its_data_and_can_be_stopped_meanwhile(
    client: OrchestratorClient, texts: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", DISK_MB) as disk:
        (disk / "runs").mkdir()
        with small_disk(disk / "runs" / ".data", 8) as data:  # so it is full before anything can be prepared
            fill(data)
            for run in ("impatient", "patient"):
                client.submit(_job(texts, run, disk / "runs", steps=30))
                await_event(reserve_in(disk / "runs" / run).exists, 60.0, "the space that the run reserves")
                fill(disk)
                full = until(client, run, lambda s: "prepared data can't be written" in str(s.warning))
                assert full.phase is RunPhase.STARTING and full.storage is StorageCondition.FULL, full
                if run == "impatient":
                    asked_s = time.monotonic()
                    client.stop(run)
                    assert time.monotonic() - asked_s < SOON_S
                    assert client.wait(run, timeout_s=100.0).phase is RunPhase.STOPPED
                    (disk / "filler").unlink()
            (data / "filler").unlink()
            (disk / "filler").unlink()
            status = client.wait("patient", timeout_s=250.0)
        assert (status.phase, status.step, status.warning) == (RunPhase.SUCCEEDED, 30, None), status
        kinds = [event["kind"] for event in client.events("patient")]
        assert kinds.index("storage_fails") < kinds.index("storage_works") < kinds.index("activated"), kinds


@pytest.mark.parametrize(
    ("kind", "hangs_s"),
    [pytest.param("ext4", HANGS_S, id="writes", marks=pytest.mark.slow), pytest.param("fuse", 20.0, id="all calls")],
)
def test_storage_that_hangs_costs_no_worker_and_no_step(
    client: OrchestratorClient, texts: Path, tmp_path: Path, kind: str, hangs_s: float
) -> None:
    with hanging_disk(kind, tmp_path / "disk", 256) as disk:
        run = client.submit(_job(texts, "hung", disk.path / "runs"))
        until(client, run, lambda s: s.step > 25 and s.checkpoint_step is not None and s.warning is None)
        began, began_s = time.time(), time.monotonic()
        with disk.hanging():
            warned = until(client, run, lambda s: "has not answered" in str(s.warning))
            assert warned.phase is RunPhase.TRAINING and warned.storage is StorageCondition.SLOW
            asked_s = time.monotonic()
            client.scale(run, 1)
            assert time.monotonic() - asked_s < SOON_S
            until(client, run, lambda s: s.workers_now == 1)
            while time.monotonic() - began_s < hangs_s:
                asked_s = time.monotonic()
                assert client.get(run).workers_now == 1
                assert time.monotonic() - asked_s < SOON_S
                time.sleep(1.0)
        ended = time.time()
        until(client, run, lambda s: s.warning is None)
        client.stop(run)
        status = client.wait(run, timeout_s=250.0)
        assert (status.phase, status.recoveries) == (RunPhase.STOPPED, ()), status
        events = list(client.events(run))
        kinds = [event["kind"] for event in events if event["time"] > began]
        assert 1 <= kinds.count("storage_fails") == kinds.count("storage_works") <= MOST_TROUBLES
        assert "worker_lost" not in {event["kind"] for event in events}
        records = read_steps(Path(status.run_dir))
        assert [record.step for record in records] == list(range(status.step))
        assert _longest_gap_s(records, began, ended) < GAP_S  # training did not wait, also on a busy machine
        _assert_undisturbed(status, texts, tmp_path)


@pytest.mark.slow
def test_a_run_whose_storage_is_not_mounted_for_a_while_waits_for_its_checkpoint(
    client: OrchestratorClient, texts: Path, tmp_path: Path
) -> None:
    """All workers are lost meanwhile, so only the checkpoint has the state. Nothing is written in its place."""
    with small_disk(tmp_path / "disk", 256) as disk:
        run = client.submit(_job(texts, "adrift", disk / "runs"))
        until(client, run, lambda s: s.step > 25 and s.checkpoint_step is not None)
        processes = until_workers(run, ("w0", "w1"))
        with unmounted(disk):
            before = until(client, run, lambda s: "not mounted" in str(s.warning))
            assert before.phase is RunPhase.TRAINING and before.storage is StorageCondition.AWAY
            for process in processes.values():
                process.kill()
            until(client, run, lambda s: s.phase is not RunPhase.TRAINING and "not mounted" in str(s.warning))
            waits_s = time.monotonic() + 20.0
            while time.monotonic() < waits_s:
                status = client.get(run)
                assert not status.phase.ended and status.recoveries == (), status
                time.sleep(1.0)
            assert list(disk.iterdir()) == []
        until(client, run, lambda s: s.warning is None and s.phase is RunPhase.TRAINING and s.step > before.step + 20)
        client.stop(run)
        status = client.wait(run, timeout_s=250.0)
        (recovery,) = status.recoveries
        assert (status.phase, recovery.source, recovery.lost) == (RunPhase.STOPPED, "checkpoint", ("w0", "w1")), status
        assert recovery.step >= 9
        records = read_steps(Path(status.run_dir))
        assert [record.step for record in records] == list(range(status.step))
        _assert_undisturbed(status, texts, tmp_path)


def _controllers(run: str) -> list[psutil.Process]:
    """Processes of the run's controller, found by their children for storage calls: titles change during calls.

    Only of the Ray that this process has started: a test in another one may have a run of the same name."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        if _command(process)[-2:] == [PROCESS, f"controller {run}"]:
            with suppress(psutil.Error):  # it has just ended
                found.add(process.parent())  # of several: one whose call hangs is replaced
    return [p for p in found if p is not None and _command(p)[0].startswith("ray::")]


def _published_warning(run: str) -> str:
    """The warning of `orchestrator status RUN`, which doesn't wait for the run's controller."""
    found = published_status(run, None)
    return "" if found is None else str(found.warning)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline() or [""]
    except psutil.Error:
        return [""]


@pytest.mark.slow
def test_a_controller_killed_while_storage_hangs_is_replaced_and_nothing_is_lost(
    client: OrchestratorClient, texts: Path, tmp_path: Path
) -> None:
    """Its process ends at once, as another one is in the call that hangs; so the next one keeps the workers alive, and
    takes up what the first one had decided: a recovery, and a request. It accepts another one, which takes effect
    later."""
    with ext4_disk(tmp_path / "disk", 256) as disk:
        run = client.submit(_job(texts, "steered", disk / "runs"))
        until(client, run, lambda s: s.step > 25 and s.checkpoint_step is not None)
        processes = until_workers(run, ("w0", "w1"))
        began_s = time.monotonic()
        with frozen(disk):
            until(client, run, lambda s: "has not answered" in str(s.warning))
            assert all(map(is_alive, processes.values()))
            processes["w1"].kill()
            await_event(lambda: not is_alive(processes["w1"]), 60.0, "the worker's end, though it writes a checkpoint")
            recovered = until(client, run, lambda s: len(s.recoveries) == 1 and s.phase is RunPhase.TRAINING)
            since = time.time()
            client.scale(run, 1)
            for _ in range(2):  # the second one has not read the journal yet
                (controller,) = _controllers(run)
                controller.kill()
                controller.wait(60.0)
                await_event(lambda: len(_controllers(run)) == 1, 120.0, "another controller")
            await_event(lambda: "has been restarted" in _published_warning(run), 120.0, "status of one that waits")
            asked_s = time.monotonic()
            with pytest.raises(NotFinished, match="has accepted the request, and has not recorded it yet"):
                client.scale(run, 2)
            assert time.monotonic() - asked_s < SOON_S
            with pytest.raises(UsageError, match="3 workers"):
                client.scale(run, 3)
            while time.monotonic() - began_s < HANGS_S:
                assert is_alive(processes["w0"])
                assert f"{run}/worker/w0" in names_of(run)
                time.sleep(1.0)
        ended = time.time()
        until(client, run, lambda s: s.warning is None and s.workers_now == s.workers_wanted == 2)  # as was requested
        client.stop(run)
        status = client.wait(run, timeout_s=250.0)
        (recovery,) = status.recoveries
        assert status.phase is RunPhase.STOPPED and recovery.step == recovered.recoveries[0].step, status
        assert (recovery.lost, recovery.source, recovery.steps_lost) == (("w1",), "memory", 0)
        assert [e["kind"] for e in client.events(run)].count("worker_lost") == 1
        assert newest_term(objects_at(Path(status.run_dir))) >= 2
        records = read_steps(Path(status.run_dir))
        assert [record.step for record in records] == list(range(status.step))
        assert _longest_gap_s(records, since, ended) < GAP_S
        _assert_undisturbed(status, texts, tmp_path)
