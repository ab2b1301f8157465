from pathlib import Path

import pytest
from ray.train import CheckpointConfig

from orchestrator.checkpoint.manifest import MANIFEST_FILE, checkpoint_name
from orchestrator.errors import NotFound
from orchestrator.policy.state.progress import Progress
from orchestrator.protocol.events.generations import Rescaled
from orchestrator.protocol.events.run import Resumed
from orchestrator.protocol.events.training import CheckpointCommitted
from orchestrator.ray_train.results import result_of, rows_of, with_validations
from orchestrator.run_records.journaled_run import JournaledRun
from orchestrator.spec.job import JobSpec
from orchestrator.storage.tasks import run_inline
from tests.unit.policy.imagined import limits_of, record

LOSSES = {0: 5.0, 2: 3.0, 4: 4.0}


def run_with(run_dir: Path, *checkpoints: int) -> JournaledRun:
    memory = JournaledRun(run_dir, limits_of(steps=30))
    (run_dir / "job.json").write_text(JobSpec(name="r").model_dump_json(by_alias=True))
    run_inline(memory.absorb([record(step, validation_loss=LOSSES.get(step)) for step in range(6)], up_to=100))
    run_inline(memory.note(Rescaled(1, 2, 2, step=2, why="", stall_s=0.25, moved_bytes=7)))
    for step in checkpoints:
        run_inline(memory.note(committed(run_dir / "checkpoints" / checkpoint_name(step, 1, 0), step)))
    committed(run_dir / "checkpoints" / checkpoint_name(9, 1, 1), 9)  # which isn't journalled
    return memory


def committed(path: Path, step: int) -> CheckpointCommitted:
    path.mkdir(parents=True)
    (path / MANIFEST_FILE).touch()
    return CheckpointCommitted(step, str(path), 0, "")


def test_a_row_per_step_with_what_changed_before_it(tmp_path: Path) -> None:
    memory = run_with(tmp_path)
    run_inline(memory.decided(memory.state, [Resumed("t", 3, None, 2)]))
    run_inline(memory.absorb([record(4, loss=1.0), record(5)], up_to=100))
    frame = result_of(tmp_path).metrics_dataframe
    assert frame is not None and list(frame["step"]) == [0, 1, 2, 3, 4, 5]
    assert frame["train/loss"][4] == 1.0 and list(frame["train/tokens"]) == [100.0 * n for n in range(1, 7)]
    assert frame["elastic/rescale_stall_s"].dropna().to_dict() == {3: 0.25}
    assert frame["eval/loss"].dropna().to_dict() == {0: 5.0, 2: 3.0}


def test_metrics_are_the_newest_with_the_newest_validation(tmp_path: Path) -> None:
    run_with(tmp_path, 1, 3)
    result = result_of(tmp_path)
    assert result.metrics is not None
    assert (result.metrics["step"], result.metrics["eval/loss"]) == (5, 4.0)
    assert result.path == str(tmp_path) and result.error is None and result.return_value is None
    assert result.checkpoint is not None and result.checkpoint.path == str(
        tmp_path / "checkpoints" / checkpoint_name(3, 1, 0)
    )


@pytest.mark.parametrize(
    ("config", "order"),
    [
        (None, [1, 3, 5, 9]),
        (CheckpointConfig(checkpoint_score_attribute="eval/loss", checkpoint_score_order="min"), [9, 1, 5, 3]),
        (CheckpointConfig(checkpoint_score_attribute="eval/loss", checkpoint_score_order="max"), [9, 3, 5, 1]),
        (CheckpointConfig(checkpoint_score_attribute="train/loss", checkpoint_score_order="min"), [9, 1, 3, 5]),
    ],
    ids=["by step", "low validation", "high validation", "low loss"],
)
def test_best_checkpoints_are_in_ray_trains_order(
    tmp_path: Path, config: CheckpointConfig | None, order: list[int]
) -> None:
    """The best one last. Of step 9 nothing is on record."""
    run_with(tmp_path, 1, 3, 5, 9)
    result = result_of(tmp_path, config)
    assert result.best_checkpoints is not None
    assert [int(Path(checkpoint.path).name.split("-")[1]) for checkpoint, _ in result.best_checkpoints] == order
    best = result.get_best_checkpoint("eval/loss", "min")
    assert best is not None and best.path.endswith(checkpoint_name(3, 1, 0))


def test_a_run_without_a_step_has_no_metrics(tmp_path: Path) -> None:
    JournaledRun(tmp_path, limits_of(steps=30))
    (tmp_path / "job.json").write_text(JobSpec(name="r").model_dump_json(by_alias=True))
    result = result_of(tmp_path)
    assert (result.metrics, result.checkpoint, result.metrics_dataframe) == (None, None, None)
    assert result.best_checkpoints == []
    with pytest.raises(NotFound, match="holds no run"):
        result_of(tmp_path / "nothing")


def test_validations_are_carried_to_the_steps_after_them() -> None:
    rows = rows_of(Progress(), [record(step, validation_loss=LOSSES.get(step)) for step in range(5)])
    rated = with_validations(rows)
    assert [rated[step]["eval/loss"] for step in range(5)] == [5.0, 5.0, 3.0, 3.0, 4.0]
    assert "eval/loss" not in rows[1] and "eval/loss" not in with_validations(rows[1:2])[1]


def test_metrics_of_a_task_keep_their_names() -> None:
    metrics, validated = {"accuracy": 0.5, "margin": 1.0}, {"accuracy": 0.25}
    steps = [record(0, metrics=metrics, validation_loss=2.0, validation_metrics=validated), record(1, metrics=metrics)]
    rows = with_validations(rows_of(Progress(), steps))
    assert rows[1]["train/metric/accuracy"] == 0.5 and rows[1]["train/metric/margin"] == 1.0
    assert rows[1]["eval/metric/accuracy"] == 0.25 and rows[1]["eval/loss"] == 2.0
