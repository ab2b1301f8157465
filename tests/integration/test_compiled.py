"""Runs of which parts are compiled, by real workers: through rescales, a loss and a resume, bit by bit."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.spec.job import JobSpec
from tests.support.texts import STEPS, VOCAB, small_job
from tests.support.worker_group import disturbed_and_undisturbed

pytestmark = pytest.mark.timeout(600)  # the first of a machine compiles


def _job(texts: Path, model: dict[str, Any], **train: Any) -> JobSpec:
    return small_job(texts, {"vocab_size": VOCAB, **model}, lr=1e-2, determinism="exact", torch_compile=True, **train)


@pytest.mark.parametrize(
    ("model", "train"),
    [
        pytest.param({}, {}, id="plain"),
        pytest.param(
            {"gradient_checkpointing": "selective"},
            {"precision": "bf16", "zero_stage": 2},
            id="bf16, recomputed",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_moves_and_is_replayed_bit_by_bit(
    texts: Path, store_dir: Path, tmp_path: Path, model: dict[str, Any], train: dict[str, Any]
) -> None:
    """A rescale, a lost worker, and a rescale to one, against a world of one that nothing happens to."""
    disturbed, undisturbed = disturbed_and_undisturbed(_job(texts, model, **train), store_dir, tmp_path)
    assert len(undisturbed.records) == STEPS
    for step, record in undisturbed.records.items():
        other = disturbed.records[step]
        assert (other.loss, other.update, other.validation_loss) == (record.loss, record.update, record.validation_loss)
    assert undisturbed.records[STEPS - 1].loss < undisturbed.records[0].loss - 0.2
