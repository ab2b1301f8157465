"""A run in a bucket, with nothing simulated but the service: it waits for rows, loses a worker, is paused, resumed,
read and removed, while requests fail."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.client import OrchestratorClient
from orchestrator.cluster.actors import find
from orchestrator.cluster.calls import ask
from orchestrator.data.bucket_store import node_stores
from orchestrator.protocol.status import RunPhase
from orchestrator.run_records.run_history import read_steps
from orchestrator.spec.fault_tolerance import CheckpointSpec
from orchestrator.spec.workers import WorkersSpec
from orchestrator.storage.backends.location import location_of, objects_at
from orchestrator.storage.condition import StorageCondition
from tests.support.buckets import s3_bucket
from tests.support.calm_runs import assert_same_tensors, calm_run
from tests.support.real_runs import own_cluster, until
from tests.support.request_proxy import RequestFault, RequestProxy
from tests.support.texts import HOLDOUT, small_job

pytestmark = [pytest.mark.ray, pytest.mark.journey, pytest.mark.timeout(1200)]

STEPS = 160
FAULTS = (
    RequestFault.LOST_REPLY,
    RequestFault.UNAVAILABLE,
    RequestFault.UNAVAILABLE_DONE,
    RequestFault.LOST_REQUEST,
    RequestFault.CONFLICT,
)


@pytest.fixture(scope="module")
def bucket() -> Iterator[tuple[str, RequestProxy]]:
    with s3_bucket() as found:  # before the cluster: its processes have the environment of the one that starts it
        yield found


@pytest.fixture(scope="module")
def client(bucket: tuple[str, RequestProxy], tmp_path_factory: pytest.TempPathFactory) -> Iterator[OrchestratorClient]:
    with own_cluster(tmp_path_factory.mktemp("home"), cpus=3) as client:
        yield client


def _command(*args: str, expect: int = 0) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", "from orchestrator.cli.main import main; main()", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == expect, f"{args} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done


@pytest.mark.slow
def test_a_run_in_a_bucket_lives_through_a_kill_a_pause_and_failing_requests(
    client: OrchestratorClient, bucket: tuple[str, RequestProxy], texts: Path, store_dir: Path, tmp_path: Path
) -> None:
    url, proxy = bucket
    storage = f"{url}/some/runs"
    plain = small_job(texts, max_steps=STEPS, determinism="exact")
    changes = {
        "name": "afar",
        "storage": storage,
        "workers": WorkersSpec(min=1, max=2, initial=2),
        "checkpoint": CheckpointSpec(every=20, keep_last=2),
        "data": plain.data.model_copy(update={"holdout": HOLDOUT}),  # so that it is the store of the tests
    }
    job = plain.model_copy(update=changes)
    run = client.submit(job)
    until(client, run, lambda s: s.step > 5)
    with proxy.failing("GET", RequestFault.FORBIDDEN):
        for blocks in node_stores().glob("*/train.blocks"):
            os.truncate(blocks, 0)
        waiting = until(client, run, lambda s: "the rows of step" in (s.warning or ""))
        assert waiting.storage is StorageCondition.AWAY
    until(client, run, lambda s: s.step > waiting.step + 5 and s.storage is StorageCondition.WELL)
    proxy.fail("PUT", *(5 * (*FAULTS, None)))
    pid = ask(find(f"{run}/worker/w1"), "call", "report", None, -1, 0.0).process.pid
    os.kill(pid, signal.SIGKILL)
    recovered = until(client, run, lambda s: bool(s.recoveries) and s.recoveries[-1].stall_s is not None)
    assert len(recovered.recoveries) == 1 and recovered.recoveries[0].steps_lost == 0
    until(client, run, lambda s: (s.checkpoint_step or 0) > recovered.step)
    client.pause(run)
    paused = client.wait(run, timeout_s=400.0)
    assert paused.phase is RunPhase.PAUSED and paused.checkpoint_step == paused.step - 1, paused
    assert "paused" in _command("status", run, "--storage", storage).stdout

    client.resume(run, workers=1)
    until(client, run, lambda s: s.step > paused.step + 2)
    client.scale(run, 2)
    proxy.fail("GET", *(5 * (RequestFault.UNAVAILABLE, RequestFault.TORN, None)))
    done = client.wait(run, timeout_s=400.0)
    assert done.phase is RunPhase.SUCCEEDED, done
    account = client.audit(run)
    assert account.ok and account.steps == STEPS
    assert [record.step for record in read_steps(location_of(done.run_dir))] == list(range(STEPS))
    names = objects_at(location_of(done.run_dir)).names("checkpoints")
    assert len(names) == 2 and all(name.startswith("step-") for name in names)

    assert_same_tensors(done, calm_run(job, done, tmp_path / "calm", store_dir))

    assert "is whole" in _command("checkpoint", "verify", run, "--storage", storage).stderr
    replayed = _command("check", "replay", run, "--storage", storage, "--workers", "1")
    assert "losses, norms and states are the same, bit for bit" in replayed.stdout
    _command("model", "eval", run, "--storage", storage, "--max-rows", "8")
    _command("model", "export", run, "--storage", storage, "--out", str(tmp_path / "exported"))
    assert (tmp_path / "exported" / "config.json").exists()
    assert "succeeded" in _command("ls", "--storage", storage).stdout
    sources = {line.split()[2] for line in _command("logs", run, "--storage", storage).stdout.splitlines()}
    assert {"controller", "w0"} <= sources  # the last lines of one that was killed are lost
    _command("rm", run, "--storage", storage, "--yes")
    assert objects_at(location_of(storage)).objects(run) == ()
