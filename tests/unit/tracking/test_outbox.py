"""What was put is there in another life of the process, once, and in order."""

import math
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.errors import ProtocolError
from orchestrator.protocol.events.base import JournalEntry
from orchestrator.protocol.events.generations import RolledBack
from orchestrator.protocol.events.run import Resumed
from orchestrator.protocol.events.training import CheckpointCommitted, CheckpointsDeleted
from orchestrator.tracking.outbox import Outbox
from orchestrator.tracking.outbox_file import FILE
from orchestrator.tracking.sinks.sink import (
    Artifact,
    Checkpoint,
    CheckpointMark,
    Dataset,
    Fate,
    Finish,
    Inputs,
    MetricPoint,
    Outcome,
)


def points(name: str, steps: range, value: float = 1.0) -> list[MetricPoint]:
    return [MetricPoint(name, value, step, time=step / 7) for step in steps]


def rest(outbox: Outbox) -> list[object]:
    """Everything that waits, taken out."""
    found: list[object] = []
    while (head := outbox.head(3))[1]:
        found += head[1]
        outbox.remove(head[0])
    return found


def test_what_was_put_survives_the_process(tmp_path: Path) -> None:
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from orchestrator.tracking.outbox import Outbox\n"
        "from orchestrator.tracking.sinks.sink import MetricPoint\n"
        "outbox = Outbox(Path(sys.argv[1]))\n"
        "outbox.put_points([MetricPoint('train/loss', 0.1 * s, s, s / 7) for s in range(50)], after=-1)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=200)
    assert done.returncode == -9
    outbox = Outbox(tmp_path)
    assert (outbox.num_waiting, outbox.position.step) == (50, 49)
    assert rest(outbox) == [MetricPoint("train/loss", 0.1 * s, s, s / 7) for s in range(50)]


def test_values_of_every_type_survive_a_round_trip(tmp_path: Path) -> None:
    things = [
        MetricPoint("train/loss", math.inf, 3, 1.5),
        MetricPoint("system/cpu_percent", 12.5, 3, 1.5, label="10.0.0.7"),
        Artifact("/runs/r/job.yaml"),
        Inputs((Dataset("corpus/train", "train", "sha256:1", "/texts", 3, 400),)),
        Checkpoint(7, 20, "/runs/r/step-20", (MetricPoint("eval/loss", 2.0, 19, 1.0),)),
        CheckpointMark(Fate.DELETED, steps=(10, 20)),
        Finish(Outcome.FAILED, "w1 died"),
    ]
    outbox = Outbox(tmp_path)
    outbox.put(things)
    assert rest(outbox) == things
    assert outbox.num_waiting == 0


def test_a_step_that_was_done_again_keeps_its_first_value(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.put_points(points("train/loss", range(5)), after=-1)
    outbox.put_points(points("train/loss", range(2, 7), value=9.0) + points("eval/loss", range(2, 3)), after=1)
    outbox.close()
    again = Outbox(tmp_path)
    again.put_points(points("train/loss", range(6, 8), value=5.0))
    taken = [(p.name, p.step, p.value) for p in rest(again) if isinstance(p, MetricPoint)]
    assert [(step, value) for name, step, value in taken if name == "train/loss"] == [
        *((step, 1.0) for step in range(5)),
        (5, 9.0),
        (6, 9.0),
        (7, 5.0),
    ]
    assert ("eval/loss", 2, 1.0) in taken


def test_loads_of_experts_are_kept_as_they_came_first(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.put_points(points("train/loss", range(5)), after=-1, loads={0: ((1, 3),), 4: ((2, 2),)})
    outbox.put_points(points("train/loss", range(2, 7)), after=1, loads={4: ((9, 9),), 6: ((4, 0),)})
    outbox.close()
    assert Outbox(tmp_path).history().loads == {0: [[1, 3]], 4: [[2, 2]], 6: [[4, 0]]}


def test_nodes_have_values_of_their_own(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    both = [MetricPoint("system/cpu_percent", 1.0, 3, 0.0, node) for node in ("a", "b")]
    outbox.put_points(both)
    outbox.put_points(both)
    assert rest(outbox) == both


def test_a_gap_is_refused(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.put_points(points("train/loss", range(3)), after=-1)
    with pytest.raises(ProtocolError, match="those after 2 are missing"):
        outbox.put_points(points("train/loss", range(5, 6)), after=4)
    outbox.put_points(points("train/loss", range(1, 6)), after=0)
    assert (outbox.position.step, len(rest(outbox))) == (5, 6)


def test_a_gap_between_events_is_refused(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    first, second, third = (JournalEntry(seq, 1, 9.0, CheckpointsDeleted((seq,))) for seq in (2, 5, 9))
    outbox.put_event(first, after=-1)
    with pytest.raises(ProtocolError, match="those after 2 are missing"):
        outbox.put_event(third, after=5)
    for event, after in ((second, 2), (third, 5), (second, 2)):
        outbox.put_event(event, after=after)
    assert outbox.position.event == 9
    assert [entry.seq for entry in outbox.history().events] == [2, 5, 9]


def test_a_checkpoint_is_published_once_and_after_the_values_of_its_step(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    event = JournalEntry(4, 1, 9.0, CheckpointCommitted(2, "/c/2", 0, ""))
    outbox.put_points(points("train/loss", range(2)), after=-1)
    outbox.put_event(event)
    outbox.put_event(JournalEntry(5, 1, 9.0, CheckpointsDeleted((2,))))
    assert [type(item) for item in rest(outbox)] == [MetricPoint] * 2
    outbox.put_points([*points("train/loss", range(2, 3), 2.5), *points("eval/loss", range(2, 3), 3.5)], after=1)
    outbox.put_event(event)  # told again by a controller that doesn't know better
    loss, validation, checkpoint, mark = rest(outbox)
    assert checkpoint == Checkpoint(4, 2, "/c/2", (loss, validation))  # type: ignore[arg-type]
    assert mark == CheckpointMark(Fate.DELETED, steps=(2,))
    for seq, event in ((6, Resumed("t", 1, None, 2)), (7, RolledBack(1, "/c/1", "all were lost"))):
        outbox.put_event(JournalEntry(seq, 1, 9.0, event))
        assert rest(outbox) == [CheckpointMark(Fate.SUPERSEDED, after=1)]


def test_the_end_is_published_once_and_not_if_the_run_resumes(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.put_finish(Finish(Outcome.FAILED, "first"))
    outbox.put_finish(Finish(Outcome.PAUSED, ""))
    assert outbox.num_waiting == 1
    outbox.withdraw_finish()
    assert (outbox.num_waiting, rest(outbox)) == (0, [])


def test_a_new_outbox_takes_over_what_the_tracker_has(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.put_points([*points("train/loss", range(8)), *points("eval/loss", range(3))])
    outbox.join({"train/loss": 5, "train/lr": 9})
    outbox.join({"eval/loss": 9})  # a second time it means nothing: what the tracker has, it has from us
    assert [p.step for p in rest(outbox)] == [6, 7, 0, 1, 2]  # type: ignore[attr-defined]
    outbox.put_points(points("train/lr", range(8, 11)))
    assert outbox.num_waiting == 1


def test_what_can_not_be_written_changes_nothing(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.put_points(points("train/loss", range(2)), after=-1)
    with pytest.raises(TypeError):
        outbox.put_event(JournalEntry(1, 1, 9.0, CheckpointCommitted(1, object(), 0, "")))  # type: ignore[arg-type]
    assert (outbox.num_waiting, outbox.position.step, len(outbox.history().events)) == (2, 1, 0)


def test_a_damaged_file_is_a_separate_error(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("no database, but long enough to be looked at as one" * 40)
    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        Outbox(tmp_path)
