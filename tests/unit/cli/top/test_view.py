"""The live screen's text, from what a real client saw and from statuses of our own."""

import math
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.top.feed import JournalTail
from orchestrator.cli.top.view import columns, event_line, in_order, remarks, row_of, view_of
from orchestrator.protocol.codec import to_plain
from orchestrator.protocol.status import Recovery, RunPhase, WorkerStatus
from orchestrator.protocol.usage import Traffic
from orchestrator.protocol.worker_phase import Phase
from tests.unit.cli.recorded_client import (
    AFTER_A_LOSS,
    ENDED,
    RESCALING,
    THREE_WORKERS,
    RecordedClient,
)
from tests.unit.cli.statuses import MEASURED, UNMEASURED, status
from tests.unit.policy.imagined import record

LOST = Recovery(3, ("w2",), "worker", 3, 2, 90, "w2 died", stall_s=1.25)


def event(kind: str, **fields: Any) -> dict[str, Any]:
    return {"seq": 1, "term": 1, "time": 1000.0, "kind": kind, **fields}


@pytest.mark.parametrize(
    ("changes", "workers", "stall"),
    [
        ({}, "3 +1", "-"),
        ({"standbys": 0}, "3", "-"),
        ({"workers_now": 2, "rescales": (MEASURED,)}, "2/3 +1", "0.62 s"),
        ({"rescales": (MEASURED, UNMEASURED)}, "3 +1", "…"),
        ({"rescales": (MEASURED,), "recoveries": (LOST,)}, "3 +1", "1.25 s"),  # the newest of both
        ({"phase": RunPhase.FAILED, "workers_now": 0}, "-", "-"),
    ],
    ids=["as wanted", "no standby", "one missing", "not measured yet", "a loss after it", "ended"],
)
def test_a_row_shows_workers_and_the_cost_of_the_last_change(changes: dict[str, Any], workers: str, stall: str) -> None:
    row = row_of(status(**changes), None)
    assert (row.workers, row.stall, row.step, row.event) == (workers, stall, "61/180", "-")


def test_before_the_first_step_there_are_no_figures() -> None:
    row = row_of(status(loss=None, tokens_per_second=None), event("submitted", run_id="try", workers=3))
    assert (row.loss, row.speed) == ("-", "-")
    assert row.event.endswith("submitted  workers=3")
    view = view_of(status(step=0, loss=None, validation_loss=None, tokens_per_second=None), [], [], None)
    assert view.loss == view.speed == view.events == () and view.traffic == ("no step yet",)
    assert view.workers == ("none yet",) and view.figures[0] == "loss -  -"


def test_active_runs_come_first_and_then_the_newest() -> None:
    runs = [
        status(run_id="old", phase=RunPhase.SUCCEEDED, ended_time=5.0),
        status(run_id="first"),
        status(run_id="new", phase=RunPhase.FAILED, ended_time=9.0),
        status(run_id="second", phase=RunPhase.STARTING),
    ]
    assert [run.run_id for run in in_order(runs)] == ["first", "second", "new", "old"]


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_the_table_fits_and_events_get_what_is_left(width: int) -> None:
    rows = [row_of(status(run_id="a-name-that-is-much-longer-than-others"), event("checkpoint", step=3))]
    shown = columns(rows, width, gap=2)
    if width >= 80:
        assert sum(column.width + 2 for column in shown) <= width
    assert ("event" in [column.field for column in shown]) == (width >= 160)
    phase = next(column for column in shown if column.field == "phase")
    assert phase.width >= max(map(len, RunPhase))  # no jump when it changes


def test_remarks_show_what_the_row_has_no_room_for() -> None:
    waiting = status(why="waits for 1 of 3 workers", warning="MLflow doesn't answer")
    told = remarks(waiting, event("straggler", worker="w1", ratio=1.6))
    assert told[0] == "waits for 1 of 3 workers" and told[1].endswith("straggler  worker=w1  ratio=1.6")
    assert told[2] == "warning: MLflow doesn't answer"
    assert remarks(status(), None) == ("active",)


def test_a_warning_hides_nothing() -> None:
    failed = status(phase=RunPhase.FAILED, error="w1 died", warning="step 7 came out otherwise")
    assert view_of(failed, [], [], None).figures[-2:] == ("w1 died", "warning: step 7 came out otherwise")


def test_events_with_many_fields_are_shown_as_sentences() -> None:
    told = event_line(event("rescaled", **vars(MEASURED)))
    assert told.endswith("rescaled  2 -> 3 workers at step 60: stall 0.62 s, 0 steps lost, 14.1 MB moved, "
                         "state identical (scheduled for step 60)")  # fmt: skip
    assert "w2 lost (worker): 3 -> 2 workers" in event_line(event("recovered", **to_plain(LOST)))
    activated = event("activated", generation=2, members=["w0", "w1"], why="scheduled", build_s=0.05)
    assert event_line(activated).endswith("activated  generation=2  members=w0,w1  why=scheduled")
    assert event_line(event("new_kind", what=1)).endswith("new_kind  what=1")
    assert event_line(event("rescaled", of="another version")).endswith("rescaled  of=another version")


def test_workers_are_shown_with_their_phase_and_slowness() -> None:
    worker_group = (
        WorkerStatus("w0", 0, Phase.TRAINING, "aaaaaaaaaaaa"),
        WorkerStatus("w1", 1, Phase.MOVING, "bbbbbbbbbbbb"),
        WorkerStatus("w2", None, Phase.WARMING),
    )
    slow = record(5, 0, 1000.0, 1.0, slowest=1, slowness=1.64)
    view = view_of(status(worker_group=worker_group), [], [slow], None)
    assert view.workers[0].split() == ["w0", "rank", "0", "training", "node", "aaaaaaaa"]
    assert view.workers[1].endswith("moving    node bbbbbbbb  1.6 x slower")
    assert view.workers[2].split() == ["w2", "-", "warming", "node", "?"]
    alone = view_of(status(worker_group=worker_group[:1]), [], [], None)
    assert alone.workers == ("w0   rank 0   training",)  # one node needs no name


def test_waits_and_what_is_sent_are_those_of_the_newest_steps() -> None:
    waits = {"communication_wait_s": 0.5, "protection_wait_s": 0.001, "snapshot_interval": 4, "compression": "int8"}
    records = [record(step, 0, 1000.0 + step, 2.0, **waits) for step in range(40)]
    sent = {"gradient": Traffic(raw=4_000_000, payload=1_000_000), "control": Traffic(raw=2000, payload=2000)}
    view = view_of(status(step=80, traffic=sent), [], records, 0.815)
    told = {line[:13].strip(): line[13:] for line in view.traffic}
    assert told["a step"] == "2.000 s" and told["waits for"] == "peers 25%"
    assert told["snapshots"] == "each 4 steps" and told["compression"] == "int8"
    assert told["sent"] == "1.0 MB a step" and told["gradient"] == "1.0 MB of 4.0 MB"
    assert "goodput 81.5%" in view.figures[0] and "3 min 20 s to go" in view.figures[0]
    assert view.speed == (50.0,) * 40 and "priority" not in view.figures[1]
    assert "priority 5" in view_of(status(priority=5), [], records, None).figures[1]
    silent = [record(1, 0, 1000.0, 2.0)]
    assert "almost nothing" in view_of(status(), [], silent, None).traffic[1]


def test_a_loss_that_is_not_finite_is_no_part_of_the_curve() -> None:
    records = [
        record(1, 0, 1.0, 1.0, loss=5.0),
        record(2, 0, 2.0, 1.0, loss=math.nan),
        record(3, 0, 3.0, 1.0, loss=4.0),
    ]
    assert view_of(status(), [], records, None).loss == (5.0, 4.0)


def test_a_real_run_from_a_loss_to_its_end(tmp_path: Path) -> None:
    client = RecordedClient(tmp_path)
    tail = JournalTail(tmp_path / "quickstart")
    tail.read()
    views, rows = [], []
    for client.now in (AFTER_A_LOSS, RESCALING, THREE_WORKERS, ENDED):
        run = client.get("quickstart")
        rows.append(row_of(run, tail.events[-1]))
        views.append(view_of(run, list(tail.events), list(tail.steps), None))
    assert [row.workers for row in rows] == ["2/3", "2/3", "3 +1", "-"]
    assert [row.phase for row in rows] == ["training", "rescaling", "training", "succeeded"]
    assert [len(view.workers) for view in views] == [3, 4, 4, 1]
    assert "moving" in "".join(views[RESCALING].workers)
    assert len(views[0].loss) == 39 and views[0].events[0].split()[1] == "rescaled"
    assert views[ENDED].done == 1.0 and views[ENDED].workers == ("none: the run has ended",)
