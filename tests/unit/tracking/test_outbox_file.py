"""The file of an outbox is held by one process."""

import sqlite3
from pathlib import Path

import pytest

from orchestrator.errors import NotFinished
from orchestrator.tracking.outbox import Outbox
from orchestrator.tracking.outbox_file import num_waiting
from orchestrator.tracking.sinks.sink import MetricPoint


def test_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.tracking.outbox_file.LOCK_PATIENCE_S", 0.1)
    assert num_waiting(tmp_path) == 0
    outbox = Outbox(tmp_path)
    outbox.put([MetricPoint("train/loss", 1.0, step, 0.0) for step in range(4)])
    with pytest.raises(NotFinished, match="another process"):
        Outbox(tmp_path)
    with pytest.raises(sqlite3.OperationalError):
        num_waiting(tmp_path)
    outbox.close()
    assert num_waiting(tmp_path) == 4
