"""Steps that are done again, and bits that flip: real workers, each in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint.manifest import checkpoint_name
from orchestrator.client import OrchestratorClient
from orchestrator.cluster.actors import find
from orchestrator.cluster.calls import ask
from orchestrator.policy.replay_check import Difference, first_difference
from orchestrator.policy.state.run_state import Commit
from orchestrator.protocol.changes import changed
from orchestrator.protocol.replay_task import PastWorld, ReplayTask, StepFingerprint
from orchestrator.protocol.status import RunPhase, RunStatus
from orchestrator.protocol.step_record import StepRecord
from orchestrator.protocol.worker_phase import Phase
from orchestrator.protocol.worker_report import ReplayResult
from orchestrator.run_records.checkpoints.completion import commit_checkpoint
from orchestrator.run_records.run_files import RunFiles
from orchestrator.spec.fault_tolerance import CheckpointSpec, VerifySpec
from orchestrator.spec.job import EvalSpec, JobSpec
from orchestrator.spec.workers import WorkersSpec
from orchestrator.state.fingerprint import whole
from orchestrator.storage.directory import DirectoryObjects
from orchestrator.storage.journal import Journal
from tests.support.faults import Fault, Moment
from tests.support.own_models import linear, own_spec
from tests.support.real_runs import until
from tests.support.recorded_run import rewrite_journal
from tests.support.texts import STEPS, small_job
from tests.support.worker_group import LocalWorkerGroup, TransitionFailed

EVERY = 5  # steps between checkpoints
STEPS_OF_PROOF = 300  # enough for a second worker to come


def _job(texts: Path) -> JobSpec:
    changes = {
        "checkpoint": CheckpointSpec(every=EVERY, keep_last=100),
        "verify": VerifySpec(every=EVERY, steps=EVERY - 1),
        "workers": WorkersSpec(min=1, max=3, initial=2, standby=1),
    }
    return small_job(texts, determinism="exact").model_copy(update=changes)


@pytest.fixture
def worker_group(texts: Path, store_dir: Path, tmp_path: Path) -> Iterator[LocalWorkerGroup]:
    with LocalWorkerGroup(_job(texts), store_dir, tmp_path, size=3) as worker_group:
        worker_group.start(worker_group.plan(worker_group.ids[:2]))
        yield worker_group


@pytest.fixture(scope="module")
def calm(texts: Path, store_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[StepRecord]:
    """The steps of a run to which nothing happens, each with the digest of the whole state."""
    with LocalWorkerGroup(_job(texts), store_dir, tmp_path_factory.mktemp("calm"), size=1) as worker_group:
        worker_group.start(worker_group.plan(worker_group.ids))
        worker_group.await_finished()
    return _wholes(worker_group)


def _commit(worker_group: LocalWorkerGroup, step: int) -> None:
    """Mark the checkpoint of this step, as the controller would."""
    assert worker_group.directive.current is not None
    members = list(worker_group.directive.current.world.members)
    worker_group.await_all(members, lambda r: any(shard.step == step for shard in r.shards))
    written = [shard for w in members for shard in worker_group.members[w].report().shards if shard.step == step]
    commit_checkpoint("test", Path(worker_group.job.storage_dir), Commit(step, 1, 0, tuple(written)))


def _path(worker_group: LocalWorkerGroup, step: int) -> str:
    return str(Path(worker_group.job.storage_dir) / "checkpoints" / checkpoint_name(step, 1, 0))


def _check(worker_group: LocalWorkerGroup, step: int, last_step: int, number: int = 0) -> ReplayTask:
    plan = worker_group.directive.current
    assert plan is not None
    past = (PastWorld(0, plan.world, plan.placement),)
    check = ReplayTask(number, worker_group.ids[2], step, _path(worker_group, step), last_step, past)
    worker_group.send(check=check)
    return check


def _fingerprints(records: Iterable[StepRecord]) -> list[StepFingerprint]:
    return [StepFingerprint.of(record) for record in records]


def _wholes(worker_group: LocalWorkerGroup) -> list[StepRecord]:
    """With one digest, that of the whole state."""
    return [changed(record, digests=(whole(record.state.digests),)) for record in worker_group.records.values()]


def _answer(worker_group: LocalWorkerGroup, check: ReplayTask) -> ReplayResult:
    worker_group.await_all([check.worker], lambda r: r.checked is not None and r.checked.number == check.number)
    answer = worker_group.members[check.worker].report().checked
    assert answer is not None and not answer.error
    return answer


def test_a_standby_does_steps_again_and_finds_them_equal(worker_group: LocalWorkerGroup) -> None:
    worker_group.await_step(14)
    _commit(worker_group, 4)
    answer = _answer(worker_group, _check(worker_group, 4, 14))
    assert [finding.step for finding in answer.findings] == list(range(5, 15))
    assert first_difference(_fingerprints(worker_group.records.values()), answer.findings) is None
    digests = {digest for finding in answer.findings for digest in finding.digests}
    assert len(digests) == 20 and all(len(finding.digests) == 2 for finding in answer.findings)
    assert worker_group.members["w2"].report().phase is Phase.STANDBY
    again = _answer(worker_group, _check(worker_group, 4, 6, number=1))  # beside what the first one left
    assert [finding.digests for finding in again.findings] == [
        worker_group.records[step].state.digests for step in (5, 6)
    ]
    worker_group.await_finished()


@pytest.mark.parametrize("tensor", ["exp_avg/", "master/"])
def test_a_bit_that_flips_in_an_update_is_found_with_its_step_and_rank(
    worker_group: LocalWorkerGroup, tensor: str
) -> None:
    worker_group.arm(Fault(1, Moment.UPDATE, step=8, flips=tensor))
    worker_group.await_step(14)
    _commit(worker_group, 4)
    answer = _answer(worker_group, _check(worker_group, 4, 14))
    assert first_difference(_fingerprints(worker_group.records.values()), answer.findings) == Difference(
        8, ("state",), (1,)
    )
    worker_group.await_finished()


@pytest.mark.parametrize("tensor", ["param/", "exp_avg_sq/", "master/"])
def test_a_bit_that_flips_at_rest_is_found_before_it_is_used(
    worker_group: LocalWorkerGroup, calm: list[StepRecord], tensor: str
) -> None:
    worker_group.arm(Fault(1, Moment.FORWARD, step=8, generation=0, flips=tensor))
    worker_group.await_all(["w1"], lambda r: r.phase is Phase.FAILED)
    error = worker_group.members["w1"].report().health.error
    assert error is not None and error.kind == "corrupted"
    assert tensor in error.message and "of rank 1 on" in error.message and "steps 7 and 8" in error.message
    worker_group.members["w1"].kill()  # as the controller does with a failed worker
    with suppress(TransitionFailed):  # if the flipped bit came into the newest snapshot, which was being taken
        worker_group.recover(["w0", "w2"])
    if worker_group.directive.next is not None:
        told = worker_group.members["w0"].report().health.error
        assert told is not None and "the state after step 7 is no longer what it was" in told.message
        plan = worker_group.recover(["w0", "w2"])
        assert plan.source is not None and plan.source.step == 6
    worker_group.await_finished()
    assert sorted(worker_group.records) == list(range(STEPS))
    assert first_difference(_fingerprints(_wholes(worker_group)), _fingerprints(calm)) is None


def test_a_check_gives_way_to_a_plan(worker_group: LocalWorkerGroup) -> None:
    worker_group.await_step(5)
    _commit(worker_group, 4)
    check = _check(worker_group, 4, STEPS - 1)
    plan = worker_group.rescale(worker_group.ids)
    answer = _answer(worker_group, check)
    assert len(answer.findings) < STEPS - 5
    assert worker_group.members["w2"].report().generation == plan.generation
    worker_group.await_finished()
    assert sorted(worker_group.records) == list(range(STEPS))
    assert first_difference(_fingerprints(worker_group.records.values()), answer.findings) is None


def test_a_check_without_its_checkpoint_fails_with_the_reason_and_training_continues(
    worker_group: LocalWorkerGroup,
) -> None:
    worker_group.await_step(5)
    check = _check(worker_group, 3, 5)  # never marked
    worker_group.await_all([check.worker], lambda r: r.checked is not None)
    report = worker_group.members[check.worker].report()
    assert report.checked is not None and "step-00000003" in report.checked.error and report.phase is Phase.STANDBY
    worker_group.rescale(worker_group.ids)
    worker_group.await_finished()
    assert sorted(worker_group.records) == list(range(STEPS))


# -- with a cluster --------------------------------------------------------------------------------------------------

FLIPS = """
        for name in ("rest", "gradient"):
            if torch.is_grad_enabled() and claimed(name):  # in training: validation comes before the digest of a step
                if name == "rest":
                    self.head.weight.data.view(torch.int32)[3, 2] ^= 1 << 12
                else:
                    self.head.weight.register_hook(lambda gradient: flip(gradient.clone()))
        return self.head(self.embedding(tokens))
"""
FLIP = """
import os
from pathlib import Path

MARKS = Path("{marks}")

def claimed(name):  # once, by the member whose mark it is: a standby that does steps again runs this too
    mark = MARKS / f"{{name}}-{{os.getpid()}}"
    try:
        mark.rename(mark.with_suffix(".done"))
    except FileNotFoundError:
        return False
    return True

def flip(gradient):  # an element's would hardly show in the norm
    gradient.view(torch.int32).bitwise_xor_(1 << 22)
    return gradient

"""


@pytest.mark.ray
@pytest.mark.journey
@pytest.mark.timeout(300)
def test_bits_that_flip_in_a_run_are_found_reported_and_repaired_where_possible(
    client: OrchestratorClient, texts: Path, tmp_path: Path
) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    source = linear(forward=FLIPS.strip(), methods=FLIP.format(marks=marks))
    job = _job(texts)
    changes = {
        "model": own_spec(tmp_path, source),
        "storage": str(tmp_path / "runs"),
        "train": job.train.model_copy(update={"max_steps": 100_000}),  # it is stopped before
        "verify": VerifySpec(every=10, steps=10),
        "checkpoint": CheckpointSpec(every=20, keep_last=3),
    }
    run = client.submit(job.model_copy(update=changes))

    def events_of(kind: str, after: int = -1) -> list[dict[str, Any]]:
        return [event for event in client.events(run, after=after) if event["kind"] == kind]

    def flip(what: str) -> None:
        worker = next(w.worker for w in client.get(run).worker_group if w.rank == 0)
        pid = ask(find(f"{run}/worker/{worker}"), "pid")
        (marks / f"{what}-{pid}").touch()

    until(client, run, lambda s: bool(events_of("checked")))
    flip("rest")
    until(client, run, lambda s: bool(events_of("worker_lost")) and not s.phase.ended and s.workers_now == 2)
    (lost,) = events_of("worker_lost")
    assert lost["cause"] == "corrupted" and "param/model.head.weight of rank" in lost["why"]
    until(client, run, lambda s: bool(events_of("checked", after=lost["seq"])))
    assert all(event["equal"] for event in events_of("checked")) and events_of("state_differs") == []

    flip("gradient")
    until(client, run, lambda s: bool(events_of("state_differs")))
    client.stop(run)
    status = client.wait(run, timeout_s=250.0)
    wrong = events_of("state_differs")[0]
    # All ranks take a gradient over, so whose it was is unknown.
    assert wrong["ranks"] == [] and wrong["parts"] == ["grad_norm", "state"] and status.phase is RunPhase.STOPPED
    assert status.warning is not None and f"step {wrong['step']} did not reproduce" in status.warning
    unequal = next(event for event in _events(status) if event["kind"] == "checked" and not event["equal"])
    assert unequal["first_step"] <= wrong["step"] <= unequal["last_step"]


def _events(status: RunStatus) -> list[dict[str, Any]]:
    return RunFiles(Path(status.run_dir)).events()


@pytest.mark.parametrize("worlds", [[2, 1], [3, 2]])
def test_nothing_differs_in_runs_with_all_that_steps_may_have(
    texts: Path, store_dir: Path, tmp_path: Path, worlds: list[int]
) -> None:
    """bf16, ZeRO 2, more ranks than experts, a batch left out, validations; across a checkpoint of another world."""
    train = {"precision": "bf16", "zero_stage": 2, "determinism": "exact"}
    plain = small_job(texts, {"n_routed_experts": 2, "num_experts_per_tok": 2}, **train)
    job = plain.model_copy(update={"checkpoint": CheckpointSpec(every=EVERY), "eval": EvalSpec(every=2)})
    with LocalWorkerGroup(job, store_dir, tmp_path, size=4) as worker_group:
        worker_group.start(worker_group.plan(worker_group.ids[: worlds[0]], skips=(7,)))
        worker_group.await_step(5)
        _commit(worker_group, 4)
        first = worker_group.directive.current
        second = worker_group.rescale(worker_group.ids[: worlds[1]], skips=(7,))
        worker_group.await_finished()
        assert first is not None and worker_group.records[7].update.skipped
        began = next(r.step for r in sorted(worker_group.records.values(), key=lambda r: r.step) if r.generation == 1)
        past = (PastWorld(0, first.world, first.placement), PastWorld(began, second.world, second.placement))
        check = ReplayTask(0, worker_group.ids[3], 4, _path(worker_group, 4), STEPS - 1, past, skips=(7,))
        worker_group.send(check=check)
        answer = _answer(worker_group, check)
    assert len(answer.findings) == STEPS - 5
    assert first_difference(_fingerprints(worker_group.records.values()), answer.findings) is None
    assert {len(finding.digests) for finding in answer.findings} == set(worlds)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.journey
@pytest.mark.timeout(400)
def test_verify_does_steps_again_with_another_number_of_workers(
    client: OrchestratorClient, texts: Path, tmp_path: Path
) -> None:
    storage, job, last = tmp_path / "runs", _job(texts), STEPS_OF_PROOF - 1
    changes = {
        "storage": str(storage),
        "name": "proof",
        "verify": VerifySpec(),
        "workers": WorkersSpec(min=1, max=2, standby=1),
        "train": job.train.model_copy(update={"max_steps": STEPS_OF_PROOF}),
    }
    run = client.submit(job.model_copy(update=changes))
    until(client, run, lambda s: s.step > 2 and s.standbys == 1)
    client.scale(run, 2)
    run_dir = Path(client.wait(run, timeout_s=250.0).run_dir)

    def verify(*args: str, expect: int = 0) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", "from orchestrator.cli.main import main; main()", "check", "replay", "proof"]
        done = subprocess.run([*command, "--storage", str(storage), *args], capture_output=True, text=True, timeout=200)
        assert done.returncode == expect, f"{args} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done

    steps = [checkpoint.step for checkpoint in RunFiles(run_dir).checkpoints()]  # none is begun beside another
    replayed = verify()
    assert (
        f"Steps {steps[-2] + 1} to {last} of run proof" in replayed.stderr
        and f"step-{steps[-2]:08d}" in replayed.stderr
    )
    assert f"{last - steps[-2]} steps: losses, norms and states are the same, bit for bit." in replayed.stdout

    found = json.loads(verify("--step", "-1", "--steps", "40", "--workers", "3", "-o", "json").stdout)
    assert found | {"equal": True, "first_step": 0, "last_step": 39, "workers": 3, "difference": None} == found

    record = next(r for r in RunFiles(run_dir).steps() if r.step == last - 2)
    assert record.world_size == 2
    wrong = f"{int(record.state.digests[1], 16) ^ 1:016x}"
    rewrite_journal(run_dir, record.state.digests[1], wrong)
    told = verify("--workers", "1", expect=3)
    assert (
        f"Step {last - 2} differs: the state that it led to, of rank 1 (w" in told.stdout
        and "numerics" not in told.stderr
    )
    worker = told.stdout.split("of rank 1 (")[1].split(")")[0]
    differs = {"processor": "a -> b"}
    Journal(DirectoryObjects(run_dir)).append([{"kind": "numerics_differ", "worker": worker, "differs": differs}])
    told = verify("--workers", "1", expect=3)
    assert f"which may be the only cause: {worker} (processor: a -> b)." in told.stderr
    assert json.loads(verify("-o", "json", expect=3).stdout)["workers_differ"] == {worker: differs}

    assert (
        f"has no step after {last}; its newest committed one is {last}" in verify("--step", str(last), expect=2).stderr
    )
    refused = " ".join(verify("--step", "7", expect=102).stderr.split())
    assert f"no checkpoint of step 7; it holds {', '.join(map(str, steps))}" in refused
    job_file = run_dir / "job.json"
    job_file.write_text(job_file.read_text().replace('"exact"', '"fast"', 1))
    assert "train.determinism of run proof is fast" in verify(expect=2).stderr
