"""A resume with another compression than the checkpoint's."""

import json
from pathlib import Path

import numpy as np
import pytest

from orchestrator.checkpoint.manifest import manifest_of
from orchestrator.checkpoint.shard_file import ShardPiece, read_shards
from orchestrator.checkpoint.write import commit
from orchestrator.errors import UsageError
from orchestrator.protocol.messages import Restore
from orchestrator.scheduler.admission import check_residuals
from orchestrator.spec.communication import CommunicationSpec, CompressionSpec
from orchestrator.spec.job import JobSpec
from tests.support.checkpoints import write_shard


def _checkpoint(directory: Path, meta: dict[str, str]) -> str:
    piece = ShardPiece("w", 0, 2, np.zeros(2, np.float32))
    shard = write_shard(directory, [piece], step=3, term=1, generation=0, rank=0, meta=json.dumps(meta))
    shards = read_shards(directory, [shard], term=1)
    return str(commit(directory, manifest_of(shards, run_id="r", term=1, shapes={"w": (2,)})))


def _job(scheme: str) -> JobSpec:
    communication = CommunicationSpec.model_validate({"compression": scheme})
    return JobSpec(name="r", communication=communication)


def test_another_compression_is_refused_unless_what_was_kept_is_left(tmp_path: Path) -> None:
    path = _checkpoint(tmp_path, {"compression": CompressionSpec(scheme="topk").keeps})
    check_residuals(Restore(3, path), _job("topk"))
    for scheme in ("int4", "none", "powersgd"):
        with pytest.raises(UsageError, match="was written by a run that kept topk: residual of its gradients") as error:
            check_residuals(Restore(3, path), _job(scheme))
        assert "--reset-residuals" in error.value.remedy
        check_residuals(Restore(3, path, reset_residuals=True), _job(scheme))


def test_a_checkpoint_of_before_there_was_compression_has_kept_nothing(tmp_path: Path) -> None:
    path = _checkpoint(tmp_path, {})
    check_residuals(Restore(3, path), _job("int8"))
    with pytest.raises(UsageError, match="kept nothing"):
        check_residuals(Restore(3, path), _job("topk"))
