"""The model that a run's end registers in MLflow: files that transformers loads, in the precision of the run."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from orchestrator.checkpoint.read import CheckpointReader
from orchestrator.data.tokenizer import TextTokenizer
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.protocol.events.base import JournalEntry
from orchestrator.protocol.events.training import CheckpointCommitted
from orchestrator.run_records.tracker_setup import tracker_setup
from orchestrator.spec.job import JobSpec
from orchestrator.tracking.tracker import Tracker
from tests.integration.test_glm4_moe import _checkpoint_of
from tests.integration.test_tracking_mlflow import PATIENCE_S, client_of, error_of
from tests.support.texts import small_job

pytestmark = pytest.mark.timeout(300)

NAME, ALIAS = "books", "champion"


def _run(texts: Path, tokenizer: Path, storage: Path, **model: Any) -> tuple[JobSpec, MoELanguageModel, Path]:
    """Job, model and checkpoint of a run in storage."""
    job = small_job(texts, sequence_length=32)
    changes = {"register_as": NAME, "alias": ALIAS}
    job = JobSpec.model_validate(job.model_dump(by_alias=True) | {"tracking": changes})
    vocab_size = TextTokenizer.load(tokenizer).vocab_size
    home = ExpertParallelContext(ExpertPlacement.balanced(job.model.n_routed_experts, 1), 0, None)
    ours = MoELanguageModel(job.model, vocab_size, home)
    ours.init_weights(5)
    (storage / "try").mkdir()
    checkpoint = _checkpoint_of(ours, storage / "try" / "checkpoints")
    job = job.model_copy(update={"model": job.model.model_copy(update=model)})
    (storage / "try" / "job.json").write_text(job.model_dump_json(by_alias=True))
    (storage / "try" / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    return job, ours.eval(), checkpoint


def _tracker(job: JobSpec, checkpoint: Path) -> tuple[Tracker, Any]:
    """The tracker of this run once it has the checkpoint, and MLflow's client."""
    run_dir = checkpoint.parents[1]
    setup = tracker_setup("try", run_dir, job)
    tracker = Tracker(setup)
    tracker.event(1, JournalEntry(0, 1, 5.0, CheckpointCommitted(7, str(checkpoint), 0, "")))
    assert tracker.finish(1, "paused", timeout_s=PATIENCE_S)
    return tracker, client_of(setup.uri)


def test_the_alias_gives_a_directory_that_transformers_loads(texts: Path, store_dir: Path, tmp_path: Path) -> None:
    job, ours, checkpoint = _run(texts, store_dir / "tokenizer.json", tmp_path)
    tracker, client = _tracker(job, checkpoint)
    left = Path(tracker_setup("try", checkpoint.parents[1], job).directory) / ".export-of-one-that-was-killed"
    left.mkdir()
    (shard, *_) = sorted(checkpoint.rglob("*.safetensors"))
    away = shard.rename(tmp_path / "away")
    assert not tracker.finish(1, "succeeded", timeout_s=1.0)
    assert "CheckpointCorrupt" in error_of(tracker)
    assert client.search_model_versions(f"name = '{NAME}'") == []
    away.rename(shard)
    for _ in range(2):  # as after a crash before the first end was noted as sent
        assert tracker.finish(1, "succeeded", timeout_s=PATIENCE_S), tracker.describe()
    (version,) = client.search_model_versions(f"name = '{NAME}'")
    assert client.get_run(version.run_id).info.status == "FINISHED"
    (model,) = client.search_logged_models([client.get_run(version.run_id).info.experiment_id])
    assert "mlflow.model.isExternal" not in model.tags
    assert not left.exists() and not list(left.parent.glob(".export-*"))

    import mlflow

    mlflow.set_tracking_uri(client.tracking_uri)
    where = mlflow.artifacts.download_artifacts(f"models:/{NAME}@{ALIAS}", dst_path=str(tmp_path / "fetched"))
    theirs = AutoModelForCausalLM.from_pretrained(where, dtype="auto", attn_implementation="eager")
    assert theirs.dtype == torch.float32
    tokens_BT = torch.arange(40).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=tokens_BT).logits, ours(tokens_BT), rtol=0.0, atol=2e-5)


def test_a_model_that_no_other_library_knows_is_registered_by_its_checkpoint(
    texts: Path, store_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job, _, checkpoint = _run(texts, store_dir / "tokenizer.json", tmp_path, entrypoint="mine:build")
    tracker, client = _tracker(job, checkpoint)
    with caplog.at_level(logging.WARNING):
        assert tracker.finish(1, "succeeded", timeout_s=PATIENCE_S), tracker.describe()
    version = client.get_model_version_by_alias(NAME, ALIAS)
    assert version.tags["orchestrator.path"] == str(checkpoint)
    with CheckpointReader(Path(version.tags["orchestrator.path"])) as reader:
        reader.verify()
    assert "has no files: run moves trains a user's model, mine:build" in caplog.text
