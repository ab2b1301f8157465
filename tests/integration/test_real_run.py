"""A run as users have it, with nothing simulated: a local cluster, Ray actors, DeepSpeed, real text, MLflow."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from mlflow import MlflowClient
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.checkpoint.hf.export import export_hf
from orchestrator.client import OrchestratorClient
from orchestrator.cluster.actors import find, names_of
from orchestrator.cluster.calls import ask
from orchestrator.errors import EntrypointError, NotFound, UsageError
from orchestrator.protocol.child_process import Evaluation, EvaluationResult, Generation, GenerationResult
from orchestrator.protocol.status import RunPhase, RunStatus
from orchestrator.run_records.run_history import read_steps
from orchestrator.spec.curriculum import CurriculumSpec
from orchestrator.spec.fault_tolerance import CheckpointSpec
from orchestrator.spec.job import JobSpec
from orchestrator.spec.workers import WorkersSpec
from orchestrator.submission.model_process import ask_model
from orchestrator.worker.runtime.errors import NO_MEMORY
from tests.support.marked_models import LOGITS, with_marked_steps
from tests.support.own_models import ROOT, linear, own_spec
from tests.support.real_runs import until
from tests.support.texts import HOLDOUT, VOCAB, small_job

pytestmark = [pytest.mark.ray, pytest.mark.journey, pytest.mark.timeout(300)]


def test_a_run_is_scaled_loses_a_member_is_paused_and_resumed(
    client: OrchestratorClient, texts: Path, tmp_path: Path
) -> None:
    plain = small_job(texts, max_steps=100_000)
    workers = WorkersSpec(min=1, max=3, initial=3)
    checkpoint = CheckpointSpec(every=8, keep_last=2)
    changes = {"name": "mortal", "workers": workers, "storage": str(tmp_path / "runs"), "checkpoint": checkpoint}
    job: JobSpec = plain.model_copy(update=changes)
    run = client.submit(job)
    until(client, run, lambda s: s.step > 9)
    pids = {w: ask(find(f"{run}/worker/{w}"), "call", "report", None, -1, 0.0).process.pid for w in ("w0", "w1", "w2")}
    os.kill(ask(find(f"{run}/rendezvous"), "pid"), signal.SIGKILL)  # the next generations meet in another one
    client.scale(run, 2)
    scaled = until(client, run, lambda s: bool(s.rescales) and s.rescales[-1].stall_s is not None)
    assert scaled.rescales[-1].to_size == 2 and scaled.rescales[-1].state_identical

    os.kill(pids["w1"], signal.SIGKILL)
    recovered = until(client, run, lambda s: bool(s.recoveries) and s.recoveries[-1].stall_s is not None)
    (recovery,) = recovered.recoveries
    assert (recovery.lost, recovery.cause, recovery.source) == (("w1",), "worker", "memory")
    assert recovery.steps_lost == 0 and recovery.steps_replayed <= 1 and recovery.state_identical
    assert recovery.stall_s is not None and recovery.stall_s < 10.0
    whole = until(client, run, lambda s: s.workers_now == 2 and s.step > recovery.step + 20)
    assert client.kill_worker(run, 0) in ("w0", "w2", "w3")
    until(client, run, lambda s: len(s.recoveries) == 2 and s.step > whole.step)
    client.pause(run)
    stopped = client.wait(run, timeout_s=250.0)
    account = client.audit(run)
    assert stopped.phase is RunPhase.PAUSED and account.ok and account.steps == stopped.step

    # It goes on from its newest checkpoint, in another world, in the same MLflow run.
    client.resume(run, workers=3)
    resumed = until(client, run, lambda s: s.step > account.steps + 20)
    assert resumed.workers_now == 3
    client.pause(run)
    paused = client.wait(run, timeout_s=250.0)
    assert paused.phase is RunPhase.PAUSED and paused.checkpoint_step == paused.step - 1
    assert client.audit(run).ok and client.audit(run).steps == paused.step
    assert len(list((Path(paused.run_dir) / "checkpoints").iterdir())) == 2  # keep_last
    with pytest.raises(UsageError, match="allows 1 to 3"):
        client.resume(run, workers=4)
    with pytest.raises(NotFound, match="no checkpoint of step 7"):
        client.resume(run, step=7)
    _one_value_per_step(paused, tmp_path)

    paused_job = JobSpec.model_validate_json((Path(paused.run_dir) / "job.json").read_text())
    tokenizer = Path(paused.run_dir) / "tokenizer.json"
    export_hf(Path(str(paused.checkpoint)), paused_job, tokenizer, tmp_path / "hf", "fp32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    text = "def __init__(self, name):\n        self."
    encoded = AutoTokenizer.from_pretrained(tmp_path / "hf")(text, return_tensors="pt")["input_ids"][:, :32]
    with torch.no_grad():
        loss = model(input_ids=encoded, labels=encoded).loss.item()
    assert loss < math.log(VOCAB) - 1.0  # it has learned, for others too


def test_a_member_that_gets_sigterm_leaves_at_a_fence(client: OrchestratorClient, texts: Path, tmp_path: Path) -> None:
    """The signal of a machine that is taken back. Another worker takes over, and no step is done twice."""
    workers = WorkersSpec(min=2, max=3, initial=2)
    changes = {"name": "polite", "workers": workers, "storage": str(tmp_path / "runs")}
    run = client.submit(small_job(texts, max_steps=100_000).model_copy(update=changes))
    until(client, run, lambda s: s.step > 9)
    pid = ask(find(f"{run}/worker/w1"), "call", "report", None, -1, 0.0).process.pid
    os.kill(pid, signal.SIGTERM)
    status = until(client, run, lambda s: bool(s.rescales) and s.rescales[-1].stall_s is not None)
    (rescale,) = status.rescales
    assert (rescale.from_size, rescale.to_size) == (2, 2) and rescale.state_identical and not status.recoveries
    assert rescale.why == "w1 must leave: it was asked to end"
    deadline_s = time.monotonic() + 200.0
    while f"{run}/worker/w1" in names_of(run) or psutil.pid_exists(pid):
        assert time.monotonic() < deadline_s, names_of(run)
        time.sleep(0.05)
    client.pause(run)
    ended = client.wait(run, timeout_s=250.0)
    assert ended.phase is RunPhase.PAUSED and not ended.recoveries and client.audit(run).steps == ended.step
    _one_value_per_step(ended, tmp_path)


@pytest.mark.slow
def test_stages_by_a_loss_and_by_hand_outlive_the_controller_and_the_cluster(
    client: OrchestratorClient, texts: Path, tmp_path: Path
) -> None:
    """The second stage comes by a validation loss, the third by hand, and a run that is resumed has them all again."""
    stages = (
        {"name": "easy", "difficulty": (0.0, 0.5), "until": {"validation_below": 5.6, "max_steps": 90_000}},
        {"name": "opening", "sequence_length": 24, "until": {"steps": 90_000}},
        {"name": "all"},
    )
    changes = {
        "name": "staged",
        "workers": WorkersSpec(min=1, max=2, initial=2),
        "storage": str(tmp_path / "runs"),
        "curriculum": CurriculumSpec.model_validate({"signal": "rarity", "stages": stages}),
        "checkpoint": CheckpointSpec(every=8, keep_last=2),
    }
    run = client.submit(small_job(texts, max_steps=100_000).model_copy(update=changes))
    until(client, run, lambda s: s.stage == "opening")
    with pytest.raises(UsageError, match="its stages are easy, opening, all"):
        client.stage(run, "hard")
    log = (tmp_path / "runs" / run / "logs" / "controller.log").read_text()
    os.kill(int(re.findall(r"controller of term \d+, pid (\d+)", log)[-1]), signal.SIGKILL)
    until(client, run, lambda s: s.step > 0)
    client.stage(run, "next")
    began = until(client, run, lambda s: s.stage == "all")
    client.kill_worker(run, 1)
    until(client, run, lambda s: len(s.recoveries) == 1 and s.step > began.step + 10)
    client.pause(run)
    paused = client.wait(run, timeout_s=250.0)
    assert paused.phase is RunPhase.PAUSED and client.audit(run).ok
    client.resume(run)
    until(client, run, lambda s: s.step > paused.step + 10)
    client.stop(run)
    over = client.wait(run, timeout_s=250.0)
    assert over.stage == "all" and client.audit(run).ok
    told = [(e["kind"], e["stage"]) for e in client.events(run) if e["kind"].startswith("stage_")]
    assert told == [
        ("stage_began", "easy"),
        ("stage_decided", "opening"),
        ("stage_began", "opening"),
        ("stage_decided", "all"),
        ("stage_began", "all"),
    ]
    decided = {e["stage"]: e["first_step"] for e in client.events(run) if e["kind"] == "stage_decided"}
    assert decided == {e["stage"]: e["step"] for e in client.events(run) if e["kind"] == "stage_began" and e["step"]}


def _one_value_per_step(status: RunStatus, tmp_path: Path) -> None:
    tracker = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    (tracked,) = tracker.search_runs([e.experiment_id for e in tracker.search_experiments()])
    assert tracked.info.status == "SCHEDULED"  # paused
    history = [metric.step for metric in tracker.get_metric_history(tracked.info.run_id, "train/loss")]
    assert sorted(history) == list(range(status.step))


@pytest.mark.slow
def test_a_users_own_model_trains_and_resumes_at_another_world_size(
    client: OrchestratorClient, texts: Path, tmp_path: Path
) -> None:
    run = client.submit(_quick_example("dense", texts, tmp_path))
    until(client, run, lambda s: s.step > 20)
    client.pause(run)
    paused = client.wait(run, timeout_s=250.0)
    assert paused.phase is RunPhase.PAUSED and paused.checkpoint_step == paused.step - 1
    client.resume(run, workers=2)
    resumed = until(client, run, lambda s: s.step > paused.step + 50)
    assert resumed.workers_now == 2
    assert resumed.loss is not None and resumed.loss < math.log(VOCAB) - 1.0
    client.stop(run)
    ended = client.wait(run, timeout_s=250.0)
    assert ended.phase is RunPhase.STOPPED and client.audit(run).ok and client.audit(run).steps == ended.step
    job = JobSpec.model_validate_json((Path(ended.run_dir) / "job.json").read_text())
    with pytest.raises(UsageError, match=r"trains a user's model, jobs\.models\.dense"):
        export_hf(Path(str(ended.checkpoint)), job, Path(ended.run_dir) / "tokenizer.json", tmp_path / "hf")
    _answers_outside_of_training(Path(ended.run_dir), str(ended.checkpoint), texts)


def test_a_run_lives_through_a_lack_of_memory_and_a_poisoned_batch(
    client: OrchestratorClient, texts: Path, store_dir: Path, tmp_path: Path
) -> None:
    plain = small_job(texts, max_steps=60)
    data = plain.data.model_copy(update={"holdout": HOLDOUT})  # so that it is the store of the tests
    workers = WorkersSpec(min=2, max=2, initial=2)
    changes = {"name": "poisoned", "workers": workers, "storage": str(tmp_path / "runs"), "data": data}
    forward = (
        f'if mark == 0 and len(tokens) > 1:\n    raise RuntimeError("{NO_MEMORY}")\n'
        f"return {LOGITS} * (500.0 if mark == 1 else 1.0)"
    )
    job = with_marked_steps(plain.model_copy(update=changes), store_dir, tmp_path, (15, 40), forward)
    run = client.submit(job)
    ended = client.wait(run, timeout_s=250.0)
    assert ended.phase is RunPhase.SUCCEEDED, ended
    assert [(r.cause, r.step, r.steps_lost) for r in ended.recoveries] == [("out_of_memory", 14, 0), ("numeric", 39, 0)]
    told = {e["kind"]: e for e in client.events(run) if e["kind"] in ("micro_batch_reduced", "batch_skipped")}
    assert (told["micro_batch_reduced"]["from_rows"], told["micro_batch_reduced"]["to_rows"]) == (2, 1)
    assert told["batch_skipped"]["step"] == 40 and "the loss of step 40 is" in told["batch_skipped"]["why"]
    account = client.audit(run)
    assert account.ok and account.steps == 60 and account.left_out == (40,)


def test_micro_batches_by_document_grow_until_every_worker_has_one(
    client: OrchestratorClient, texts: Path, tmp_path: Path
) -> None:
    """The memory of this machine is more than they need."""
    plain = small_job(texts, max_steps=100_000, micro_batch_size="auto", global_batch_size=32, sequence_length=64)
    data = plain.data.model_copy(update={"holdout": HOLDOUT, "row_format": "documents"})
    workers = WorkersSpec(min=2, max=2, initial=2)
    changes = {"name": "fitted", "workers": workers, "storage": str(tmp_path / "runs"), "data": data}
    run = client.submit(plain.model_copy(update=changes))
    run_dir = Path(client.get(run).run_dir)
    until(client, run, lambda s: s.step > 40 and read_steps(run_dir)[-1].batch.num_micro_batches == 2)
    client.stop(run)
    ended = client.wait(run, timeout_s=250.0)
    assert ended.phase is RunPhase.STOPPED and not ended.recoveries, ended
    fitted = [(e["from_tokens"], e["to_tokens"]) for e in client.events(run) if e["kind"] == "micro_batch_fitted"]
    assert fitted[0] == (64, 256) and all(after > before for before, after in fitted)
    steps = read_steps(run_dir)
    assert steps[0].batch.num_micro_batches > 16 and steps[-1].batch.num_micro_batches == 2
    assert {step.batch.num_positions for step in steps} == {32} and client.audit(run).ok
    assert steps[-1].loss < steps[0].loss - 0.5


def test_a_model_that_crashes_in_workers_only_fails_once_with_the_users_traceback(
    client: OrchestratorClient, texts: Path, tmp_path: Path
) -> None:
    """What crashes where the job is submitted is refused there (`tests/unit/cli`)."""
    crash = "import sys\nif 'ray' in sys.modules:\n    raise OSError('no licence on this host')\n"
    model = own_spec(tmp_path, crash + linear())
    spec = small_job(texts, model.model_dump()).model_copy(
        update={"name": "crashing", "storage": str(tmp_path / "runs")}
    )
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json", by_alias=True)))
    command = [sys.executable, "-c", "from orchestrator.cli.main import main; main()", "run", "job.yaml"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 100, done.stderr
    assert "Traceback (most recent call last)" in done.stderr and "no licence on this host" in done.stderr
    assert f'File "{tmp_path}/{str(model.entrypoint).partition(":")[0]}.py", line 3, in <module>' in done.stderr
    kinds = [event["kind"] for event in client.events("crashing")]
    assert kinds.count("workers_spawned") == 1 and "worker_lost" not in kinds and kinds[-1] == "ended"
    assert names_of("crashing") == []


def _answers_outside_of_training(run_dir: Path, checkpoint: str, texts: Path) -> None:
    *_, measured = ask_model(Evaluation(str(run_dir), checkpoint, corpus=str(texts), max_rows=8))
    assert isinstance(measured, EvaluationResult) and measured.loss < math.log(VOCAB) - 1.0
    asked = Generation(str(run_dir), checkpoint, "def ", 4, temperature=0.0, top_k=None, top_p=1.0, seed=0)
    *_, written = ask_model(asked)
    assert isinstance(written, GenerationResult) and (len(written.tokens) == 4 or written.ended)
    too_long = replace(asked, prompt="x " * 400)  # the module has 128 positions
    with pytest.raises(EntrypointError, match=r"jobs\.models\.dense:build on \d+ tokens raised IndexError"):
        list(ask_model(too_long))


def _quick_example(name: str, texts: Path, tmp_path: Path) -> Path:
    """jobs/own-NAME.yaml with a smaller model on little text, as a file elsewhere."""
    job = yaml.safe_load((ROOT / "jobs" / f"own-{name}.yaml").read_text())
    job["model"] |= {"code_dir": str(ROOT), "hidden_size": 32, "intermediate_size": 64}
    job["train"] |= {"sequence_length": 32, "max_steps": 100_000}
    job |= {"workers": {"max": 2, "initial": 1}, "storage": str(tmp_path / "runs"), "eval": {}}
    job["data"] = {"source": str(texts), "vocab_size": VOCAB}
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(job))
    return path
