"""Runs whose exits learn beside the last layer, by real workers: through rescales, a loss and a resume, bit by bit."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.spec.job import JobSpec
from tests.support.texts import STEPS, VOCAB, small_job
from tests.support.worker_group import disturbed_and_undisturbed

pytestmark = pytest.mark.usefixtures("device")


def _job(texts: Path, model: dict[str, Any], **train: Any) -> JobSpec:
    sizes = {"vocab_size": VOCAB, "num_hidden_layers": 3, "exits": {"layers": [1, 2]}, **model}
    return small_job(texts, sizes, lr=1e-2, determinism="exact", **train)


@pytest.mark.parametrize(
    ("model", "train"),
    [
        pytest.param({}, {}, id="plain", marks=pytest.mark.long_emulated),
        pytest.param(
            {"gradient_checkpointing": "sqrt"},
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
        assert (other.loss, other.update, other.metrics) == (record.loss, record.update, record.metrics)
        assert record.metrics.keys() == {"exit_1_loss", "exit_2_loss"}
    first, last = undisturbed.records[0], undisturbed.records[STEPS - 1]
    for name in first.metrics:
        assert last.metrics[name] < first.metrics[name] - 0.2
    validated = [record for record in undisturbed.records.values() if record.validation_loss is not None]
    assert validated[-1].validation_metrics.keys() == {"exit_1_loss", "exit_2_loss"}
