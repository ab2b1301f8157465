"""What is known of workers that are gone."""

from pathlib import Path
from unittest.mock import Mock

import pytest

from orchestrator.controller import worker_group
from orchestrator.controller.worker_group import WorkerGroup
from orchestrator.protocol.worker_phase import Phase
from orchestrator.protocol.worker_report import Report, ShardWritten
from orchestrator.spec.job import JobSpec


def _shard(step: int, rank: int) -> ShardWritten:
    return ShardWritten(step, 0, rank, f"rank-{rank}", "", (), 0, "{}")


def test_the_last_reports_of_workers_that_are_gone_stay_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_group, "remove_group", lambda name: None)
    monkeypatch.setattr(worker_group, "MAX_GONE", 3)
    group = WorkerGroup("run", tmp_path, JobSpec(name="run"), "", 1, Mock())
    for rank, steps in enumerate([(9,), (9, 19), (), (19,)]):
        worker = f"w{rank}"
        group._handles[worker] = Mock()
        shards = tuple(_shard(step, rank) for step in steps)
        group.reports[worker] = Report(worker, 1, 0, Phase.TRAINING, 0, 20 + rank, 0, shards=shards)
    group._handles["w4"] = Mock()  # never answered
    group.reconcile(("w1", "w2", "w3", "w4"))
    assert [(report.step, report.shards) for report in group.gone.values()] == [(20, (_shard(9, 0),))]
    group.reconcile(())
    assert {worker: report.shards for worker, report in group.gone.items()} == {
        "w1": (_shard(19, 1),),
        "w2": (),
        "w3": (_shard(19, 3),),
    }
