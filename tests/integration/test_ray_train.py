"""`ElasticTrainer` as its users have it: configs of Ray Train in, real runs, `ray.train.Result` out."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray.train
import yaml
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback

from orchestrator import ElasticTrainer
from orchestrator.checkpoint.read import CheckpointReader
from orchestrator.client import OrchestratorClient
from orchestrator.cluster import local
from orchestrator.errors import NotFound, RunFailed, UsageError
from orchestrator.protocol.status import RunPhase
from orchestrator.run_records.run_files import RunFiles, holds_run
from tests.support.hosts import until as await_event
from tests.support.own_models import ROOT, linear, own_spec
from tests.support.real_runs import PATIENCE_S, at_home, until
from tests.support.texts import small_job

pytestmark = [pytest.mark.ray, pytest.mark.journey, pytest.mark.timeout(300)]

STEPS = 200


class Recorder(UserCallback):
    """Records its calls."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.sizes: list[int] = []
        self.checkpoints: list[tuple[int, str]] = []
        self.exceptions: list[dict[int, Exception]] = []
        self.names: set[str] = set()

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        self.names.add(run_context.get_run_config().name)
        if checkpoint is not None:
            self.checkpoints.append((metrics[0]["step"], checkpoint.path))
            return
        self.steps.append(metrics[0]["step"])
        self.sizes.append(len(metrics))

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self.exceptions.append(worker_exceptions)


def job_of(texts: Path, **changes: Any) -> dict[str, Any]:
    plain = small_job(texts, max_steps=STEPS).model_dump(mode="json", by_alias=True, exclude_unset=True)
    return {"schema": "v1", **plain, "checkpoint": {"every": 20}, **changes}


def test_a_fit_is_scaled_and_loses_a_member(client: OrchestratorClient, texts: Path, tmp_path: Path) -> None:
    go = tmp_path / "go"  # steps are slow until it is there
    forward = (
        f"import os, time\n        time.sleep(0.0 if os.path.exists({str(go)!r}) else 0.1)\n"
        "        return self.head(self.moe(self.embedding(tokens)))"
    )
    model = own_spec(tmp_path, linear(layers="self.moe = MoELayer(spec, experts)", forward=forward))
    job = job_of(texts, model=model.model_dump(exclude_unset=True), autoscale={"policy": "manual"})
    recorder, storage = Recorder(), tmp_path / "runs"

    def trainer(job: dict[str, Any], **more: Any) -> ElasticTrainer:
        kept = CheckpointConfig(num_to_keep=2, checkpoint_score_attribute="eval/loss", checkpoint_score_order="min")
        run = RunConfig(name="fitted", storage_path=str(storage), checkpoint_config=kept, **more)
        return ElasticTrainer(job, scaling_config=ScalingConfig(num_workers=(1, 2)), run_config=run)

    failures = FailureConfig(max_failures=3)
    with ThreadPoolExecutor(2) as pool:
        fitted = pool.submit(trainer(job, callbacks=[recorder], failure_config=failures).fit)
        await_event(lambda: _is_known(client, "fitted") or fitted.done(), PATIENCE_S, "the run to be known")
        until(client, "fitted", lambda s: s.step > 1)
        late = Recorder()
        followed = pool.submit(trainer(job, callbacks=[late], failure_config=failures).fit)  # of the run that goes on
        client.scale("fitted", 2)
        until(client, "fitted", lambda s: s.workers_now == 2 and s.phase is RunPhase.TRAINING)
        client.kill_worker("fitted", 1)
        until(client, "fitted", lambda s: len(s.recoveries) == 1 and s.phase is RunPhase.TRAINING)
        go.touch()
        result, same = fitted.result(timeout=PATIENCE_S), followed.result(timeout=PATIENCE_S)

    assert isinstance(result, ray.train.Result) and result.error is None
    assert result.path == str(storage / "fitted")
    frame = result.metrics_dataframe
    assert frame is not None and list(frame["step"]) == list(range(STEPS))
    assert set(frame["elastic/world_size"]) == {1, 2} and frame["train/loss"].iloc[-1] < frame["train/loss"].iloc[0]
    assert frame["elastic/recovery_stall_s"].notna().sum() == 1
    assert frame["eval/loss"].notna().sum() == STEPS // 10 + 1  # and before the first step
    assert result.metrics is not None and result.metrics["step"] == STEPS - 1
    assert result.metrics["train/loss"] == frame["train/loss"].iloc[-1]

    assert result.checkpoint is not None
    with result.checkpoint.as_directory() as directory, CheckpointReader(Path(directory)) as reader:
        reader.verify()
        assert reader.manifest.step == STEPS - 1
    assert result.best_checkpoints is not None and len(result.best_checkpoints) in (2, 3)
    losses = [metrics["eval/loss"] for _, metrics in result.best_checkpoints]
    assert losses == sorted(losses, reverse=True)
    best = result.get_best_checkpoint("eval/loss", "min")
    assert best is not None and best.path == result.best_checkpoints[-1][0].path

    assert recorder.steps == list(range(STEPS)) and set(recorder.sizes) == {1, 2} and recorder.names == {"fitted"}
    written = [event["step"] for event in client.events("fitted") if event["kind"] == "checkpoint"]
    assert [step for step, _ in recorder.checkpoints] == written and written[-1] == STEPS - 1
    assert set(written) <= {*range(19, STEPS, 20)} and len(written) > 2  # one is left out while another is written
    assert recorder.checkpoints[-1][1] == result.checkpoint.path
    assert [list(failed) for failed in recorder.exceptions] == [[1]]
    assert "died" in str(recorder.exceptions[0][1])

    assert same.metrics == result.metrics and late.exceptions and 0 < len(late.steps) < STEPS
    assert late.steps == recorder.steps[-len(late.steps) :]

    again = trainer(job, callbacks=[recorder], failure_config=failures).fit()  # it has succeeded: nothing is begun
    assert again.checkpoint is not None and again.checkpoint.path == result.checkpoint.path
    assert len(recorder.steps) == STEPS
    with pytest.raises(UsageError, match=r"run of another job: train\.lr was 0\.003, not 0\.1"):
        trainer(job | {"train": job["train"] | {"lr": 0.1}}, failure_config=failures).fit()


def test_a_failure_raises_ray_trains_error_and_the_next_fit_resumes(
    client: OrchestratorClient, texts: Path, tmp_path: Path
) -> None:
    counting = "self.calls = getattr(self, 'calls', 0) + 1\n        {}return self.head(self.embedding(tokens))"
    broken = counting.format("if self.calls > 60:\n            raise ValueError('a mistake')\n        ")
    model = own_spec(tmp_path, linear(forward=broken))
    job = job_of(texts, model=model.model_dump(exclude_unset=True), checkpoint={"every": 5})
    job["train"] |= {"max_steps": 60}
    recorder = Recorder()

    def trainer() -> ElasticTrainer:
        failures = FailureConfig(max_failures=1)
        run = RunConfig(storage_path=str(tmp_path / "runs"), failure_config=failures, callbacks=[recorder])
        return ElasticTrainer(job | {"name": "mistaken"}, scaling_config=ScalingConfig(num_workers=1), run_config=run)

    with pytest.raises(ray.train.TrainingFailedError) as failed:
        trainer().fit()
    assert isinstance(failed.value, ray.train.WorkerGroupError) and isinstance(failed.value.__cause__, RunFailed)
    assert "ValueError: a mistake" in str(failed.value)
    assert list(failed.value.worker_failures) == [0] and len(recorder.exceptions) == 2
    assert client.get("mistaken").phase is RunPhase.FAILED

    module = str(model.entrypoint).partition(":")[0]
    (tmp_path / f"{module}.py").write_text(linear(forward=counting.format("")))
    result = trainer().fit()
    assert result.metrics_dataframe is not None and list(result.metrics_dataframe["step"]) == list(range(60))
    assert [event["kind"] for event in client.events("mistaken")].count("resumed") == 1
    assert len(recorder.exceptions) == 2 and recorder.steps[-1] == 59


def test_a_callback_that_raises_ends_the_run(client: OrchestratorClient, texts: Path, tmp_path: Path) -> None:
    class Picky(UserCallback):
        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            if metrics[0]["step"] == 3:
                raise LookupError("not the third")

    job = job_of(texts, name="picky", storage=str(tmp_path / "runs"))
    job["train"] |= {"max_steps": 100_000}
    with pytest.raises(ray.train.ControllerError) as failed:
        ElasticTrainer(job, run_config=RunConfig(callbacks=[Picky()])).fit()
    assert isinstance(failed.value.controller_failure, LookupError)
    assert client.get("picky").phase is RunPhase.STOPPED and client.audit("picky").ok


def test_the_example_of_the_page_runs_without_a_cluster(texts: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "ray-train.md").read_text(encoding="utf-8")
    (example,) = [block for block in page.split("```python\n")[1:] if ".fit()" in block]
    (tmp_path / "jobs").mkdir()
    job = job_of(texts) | {"train": small_job(texts, max_steps=30).train.model_dump(mode="json", exclude_unset=True)}
    (tmp_path / "jobs" / "quickstart.yaml").write_text(yaml.safe_dump(job))
    done = _script(tmp_path, example.partition("```")[0], texts)
    said, errors = done.communicate(timeout=PATIENCE_S)
    assert done.returncode == 0, errors
    assert "step-00000029" in said
    assert not (tmp_path / "clusters" / "local" / "cluster.json").exists()


def test_ctrl_c_stops_the_run(texts: Path, tmp_path: Path) -> None:
    job = job_of(texts, name="stopped", storage="runs")
    job["train"] |= {"max_steps": 100_000}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    done = _script(tmp_path, "from orchestrator import ElasticTrainer\nElasticTrainer('job.yaml').fit()\n", texts)
    run_dir = tmp_path / "runs" / "stopped"
    await_event(
        lambda: (holds_run(run_dir) and RunFiles(run_dir).status().step > 3) or done.poll() is not None,
        PATIENCE_S,
        "steps to be on record",
    )
    try:
        done.send_signal(signal.SIGINT)
        _, errors = done.communicate(timeout=PATIENCE_S)
    finally:  # whatever went wrong, its cluster is not left behind
        done.kill()
        with at_home(tmp_path):
            left = local.down()
    assert done.returncode != 0 and "KeyboardInterrupt" in errors and left is None
    status = RunFiles(run_dir).status()
    assert status.phase is RunPhase.STOPPED and status.checkpoint_step == status.step - 1


def _script(directory: Path, text: str, texts: Path) -> "subprocess.Popen[str]":
    """A user's script in `directory`, with a home of its own there."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env = {**kept, "ORCHESTRATOR_HOME": str(directory), "PYTHONPATH": str(ROOT)}
    (directory / "script.py").write_text(text)
    return subprocess.Popen(
        [sys.executable, "script.py"],
        cwd=directory,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _is_known(client: OrchestratorClient, run: str) -> bool:
    try:
        return not client.get(run).phase.ended
    except NotFound:
        return False
