"""Stages of difficulty with real workers: the same samples in the same order, whichever worker is lost."""

import json
from pathlib import Path

import pytest

from orchestrator.protocol.messages import StageStart
from orchestrator.protocol.step_record import StepRecord
from orchestrator.protocol.worker_phase import Phase
from orchestrator.sampling.sample_ledger import audit
from orchestrator.spec.curriculum import CurriculumSpec
from orchestrator.spec.job import JobSpec
from tests.support.texts import STEPS, prepare_texts, small_job
from tests.support.worker_group import LocalWorkerGroup

STAGES = [
    {"name": "easy", "difficulty": [0.0, 0.5], "sequence_length": 16, "until": {"steps": 8}},
    {
        "name": "opening",
        "pace": {"kind": "root", "start": 0.2, "steps": 10},
        "sequence_length": 24,
        "until": {"tokens": 2400},  # ten steps
    },
    {"name": "all"},
]
BEGIN = {"easy": 0, "opening": 8, "all": 18}


def _job(texts: Path) -> JobSpec:
    # Tokens visit all experts: else rounding decides after some steps which of two equally good ones they get.
    plain = small_job(texts, {"num_experts_per_tok": 6}).model_dump(by_alias=True, mode="json")
    return JobSpec.model_validate_json(json.dumps({**plain, "curriculum": {"signal": "rarity", "stages": STAGES}}))


@pytest.fixture(scope="module")
def scored_dir(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_texts(texts, tmp_path_factory.mktemp("scored"), difficulty="rarity")


@pytest.fixture(scope="module")
def alone(texts: Path, scored_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, StepRecord]:
    """What one undisturbed worker did."""
    with LocalWorkerGroup(_job(texts), scored_dir, tmp_path_factory.mktemp("alone"), size=1) as worker_group:
        worker_group.start(worker_group.plan(worker_group.ids))
        worker_group.await_finished()
    return worker_group.records


def test_stages_begin_at_the_steps_of_the_job(alone: dict[int, StepRecord]) -> None:
    assert len(alone) == STEPS
    begun = {stage: min(r.step for r in alone.values() if r.batch.stage == stage) for stage in BEGIN}
    assert begun == BEGIN
    assert {r.batch.stage: r.batch.sequence_length for r in alone.values()} == {"easy": 16, "opening": 24, "all": 32}


@pytest.mark.parametrize("kill_after", [6, 16], ids=["before the second stage", "before the third"])
def test_a_death_changes_no_sample_of_any_stage(
    texts: Path, scored_dir: Path, tmp_path: Path, alone: dict[int, StepRecord], kill_after: int
) -> None:
    with LocalWorkerGroup(_job(texts), scored_dir, tmp_path, size=3) as worker_group:
        worker_group.start(worker_group.plan(worker_group.ids))
        worker_group.await_step(kill_after)
        worker_group.members[worker_group.ids[1]].kill()
        survivors = [worker_group.ids[0], worker_group.ids[2]]
        worker_group.await_all(survivors, lambda r: r.phase is Phase.STRANDED)
        worker_group.recover(survivors)
        worker_group.await_finished()
    assert sorted(worker_group.records) == list(range(STEPS))
    assert audit(
        [(r.step, r.batch.first_position, r.batch.num_positions) for _, r in sorted(worker_group.records.items())]
    ).ok
    for step, record in worker_group.records.items():
        same = alone[step]
        assert (record.batch.stage, record.batch.sequence_length, record.batch.tokens) == (
            same.batch.stage,
            same.batch.sequence_length,
            same.batch.tokens,
        )
        assert (record.batch.first_position, record.batch.num_positions) == (
            same.batch.first_position,
            same.batch.num_positions,
        )
        assert record.loss == pytest.approx(same.loss, rel=1e-5)


def test_a_stage_that_is_decided_begins_on_all_members_at_its_step(
    texts: Path, scored_dir: Path, tmp_path: Path, alone: dict[int, StepRecord]
) -> None:
    """It stays decided for the survivors of a lost worker. A decision that comes too late is ignored by all."""
    late, in_time = (StageStart("opening", 1),), (StageStart("opening", STEPS - 12),)
    job = _job(texts).model_copy(update={"curriculum": _long_first_stage()})
    with LocalWorkerGroup(job, scored_dir, tmp_path, size=3) as worker_group:
        worker_group.start(worker_group.plan(worker_group.ids))
        worker_group.await_step(3)
        worker_group.send(stages=late, stages_version=1)
        worker_group.await_step(6)
        worker_group.send(stages=in_time, stages_version=2)
        worker_group.await_step(STEPS - 10)
        worker_group.members[worker_group.ids[1]].kill()
        survivors = [worker_group.ids[0], worker_group.ids[2]]
        worker_group.await_all(survivors, lambda r: r.phase is Phase.STRANDED)
        worker_group.recover(survivors)
        worker_group.await_finished()
    stages = [worker_group.records[step].batch.stage for step in range(STEPS)]
    assert stages == ["easy"] * (STEPS - 12) + ["opening"] * 10 + ["all"] * 2
    assert audit(
        [(r.step, r.batch.first_position, r.batch.num_positions) for _, r in sorted(worker_group.records.items())]
    ).ok
    assert [worker_group.records[step].loss for step in range(8)] == pytest.approx(
        [alone[step].loss for step in range(8)], rel=1e-5
    )


def _long_first_stage() -> CurriculumSpec:
    easy = {**STAGES[0], "until": {"steps": 1000}}
    return CurriculumSpec.model_validate_json(json.dumps({"signal": "rarity", "stages": [easy, *STAGES[1:]]}))
