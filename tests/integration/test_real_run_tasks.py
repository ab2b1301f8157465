"""Runs of tasks on a local cluster: scaled, killed, paused and resumed, with the bits of an undisturbed one."""

import os
import signal
from pathlib import Path

import pytest

from orchestrator.client import OrchestratorClient
from orchestrator.cluster.actors import find
from orchestrator.cluster.calls import ask
from orchestrator.protocol.child_process import Evaluation, EvaluationResult
from orchestrator.protocol.status import RunPhase
from orchestrator.protocol.worker_report import Report
from orchestrator.run_records.run_history import read_steps
from orchestrator.spec.workers import WorkersSpec
from orchestrator.submission.model_process import ask_model, data_of
from tests.support.calm_runs import assert_same_tensors, calm_run
from tests.support.real_runs import until
from tests.support.tasks import task_job

pytestmark = [pytest.mark.ray, pytest.mark.journey, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize(("task", "steps"), [("dpo", 300), ("own", 800)])
def test_a_task_survives_what_happens_to_its_run(
    client: OrchestratorClient, tmp_path: Path, task: str, steps: int
) -> None:
    """2 to 3 workers, one killed, a pause, and a resume on 1."""
    job = task_job(task, tmp_path, max_steps=steps, determinism="exact", lr_scheduler={"kind": "constant"}, lr=1e-3)
    # The default limit of a step's loss is made for language models; the regression's varies more than that. Biases of
    # routers move after a step's validation, so with them the checkpoint's loss would be another one.
    recovery = job.recovery.model_copy(update={"loss_explosion": None})
    model = job.model.model_copy(update={"bias_update_speed": 0.0})
    job = job.model_copy(update={"recovery": recovery, "model": model})
    changes = {"name": task, "workers": WorkersSpec(min=1, max=3, initial=2), "storage": str(tmp_path / "runs")}
    run = client.submit(job.model_copy(update=changes))
    own_code, elsewhere = tmp_path / "own_task.py", tmp_path / "elsewhere.py"
    if own_code.exists():  # the run goes on with what was submitted
        own_code.rename(elsewhere)
    until(client, run, lambda s: s.step > 10)
    client.scale(run, 3)
    scaled = until(client, run, lambda s: s.workers_now == 3)
    status = until(client, run, lambda s: s.step > scaled.step + 10)
    member = next(each.worker for each in status.worker_group if each.rank == 2)
    report: Report = ask(find(f"{run}/worker/{member}"), "call", "report", None, -1, 0.0)
    os.kill(report.process.pid, signal.SIGKILL)
    recovered = until(client, run, lambda s: len(s.recoveries) == 1 and s.recoveries[0].stall_s is not None)
    until(client, run, lambda s: s.step > recovered.step + 10)
    client.pause(run)
    paused = until(client, run, lambda s: s.phase is RunPhase.PAUSED)
    assert paused.step < steps
    client.resume(run, workers=1)
    moved = client.wait(run, timeout_s=240.0)
    assert moved.phase is RunPhase.SUCCEEDED and client.audit(run).ok, moved
    if elsewhere.exists():
        elsewhere.rename(own_code)
    calm = calm_run(job, moved, tmp_path / "calm")
    assert_same_tensors(moved, calm)
    for one, other in zip(read_steps(Path(moved.run_dir)), calm.records, strict=True):
        assert (one.loss, one.metrics, one.validation_metrics) == (other.loss, other.metrics, other.validation_metrics)
    assert moved.unit == ("tokens" if job.has_tokens else job.task.unit)
    validated = [record.validation_metrics for record in calm.records if record.validation_loss is not None]
    assert moved.validation_metrics == validated[-1] != {}

    rows = data_of(run, Path(moved.run_dir)).store_dir
    request = Evaluation(moved.run_dir, str(moved.checkpoint), rows, max_rows=job.eval.rows)
    (result,) = [answer for answer in ask_model(request) if isinstance(answer, EvaluationResult)]
    assert result.unit == job.task.unit and set(result.metrics) == set(moved.validation_metrics)
    assert moved.validation_loss is not None and result.loss == pytest.approx(moved.validation_loss, rel=1e-4)
