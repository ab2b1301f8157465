"""The story of a run: what the picture and the table hold."""

import json
import math
from pathlib import Path

from orchestrator.protocol.events.base import JournalEntry
from orchestrator.protocol.events.generations import Rescaled
from orchestrator.protocol.events.run import Submitted
from orchestrator.protocol.events.workers import WorkerLost
from orchestrator.tracking.charts import draw, figure_of
from orchestrator.tracking.history import MOST_POINTS, History, write_table
from orchestrator.tracking.outbox import Outbox
from orchestrator.tracking.sinks.sink import MetricPoint

RESCALED = JournalEntry(3, 1, 1.7e9, Rescaled(1, 2, 3, step=39, why="asked for", stall_s=0.30127))
DETAILS = "generation 1, from_size 2, to_size 3, why asked for, moved_bytes 0, stall_s 0.3013, steps_lost 0"
LOST = JournalEntry(4, 1, 1.7e9, WorkerLost("<w1>", "killed", member=True))


def history_of(tmp_path: Path, steps: int = 60) -> History:
    outbox = Outbox(tmp_path)
    points = []
    for step in range(steps):
        loss = math.inf if step == 5 else 9.0 - step / steps
        points.append(MetricPoint("train/loss", loss, step, 0.0))
        points.append(MetricPoint("elastic/world_size", 2.0 + (step >= 40), step, 0.0))
    outbox.put_points(points, after=-1)
    outbox.put_event(JournalEntry(0, 1, 1.7e9, Submitted("demo", 2)))
    outbox.put_event(RESCALED)
    outbox.put_event(LOST)
    return outbox.history()


def test_marks_stand_where_things_happened_and_are_explained(tmp_path: Path) -> None:
    figure = figure_of(history_of(tmp_path), "demo")
    loss, world = figure.axes
    assert "loss" in loss.get_ylabel() and "workers" in world.get_ylabel() and world.get_xlabel() == "step"
    assert [text.get_text() for text in loss.texts] == ["2→3"]
    lines = sorted(line.get_xdata()[0] for line in world.lines[1:])  # type: ignore[index]
    assert lines == [40, 59]  # the new world's first step; the newest step when the loss was heard of
    assert [text.get_text() for text in figure.legends[0].texts] == ["train", "rescale", "worker lost"]


def test_the_page_needs_nothing_else_and_believes_no_text(tmp_path: Path) -> None:
    png, page = draw(history_of(tmp_path), "a <run>", tmp_path)
    assert png.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert "<svg" in text and "a &lt;run&gt;" in text and "&lt;w1&gt;" in text and "<w1>" not in text
    assert "<script" not in text and 'src="http' not in text


def test_the_table_has_a_row_per_event(tmp_path: Path) -> None:
    table = json.loads(write_table(history_of(tmp_path), tmp_path).read_text())
    assert table["columns"] == ["time", "step", "event", "details"]
    assert table["data"][1] == ["2023-11-14 22:13:20", 39, "rescaled", DETAILS]
    assert [row[1] for row in table["data"]] == [59, 39, 59]


def test_a_long_run_is_thinned_out_but_no_change_of_size_is_lost(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    steps = 3 * MOST_POINTS
    points = [MetricPoint("train/loss", 1.0, step, 0.0) for step in range(steps)]
    points += [MetricPoint("elastic/world_size", 3.0 if step == 1000 else 2.0, step, 0.0) for step in range(steps)]
    outbox.put_points(points)
    curves = outbox.history().curves
    assert len(curves["train/loss"]) <= MOST_POINTS + 1 and curves["train/loss"][-1][0] == steps - 1
    assert {1000: 3.0, 1001: 2.0}.items() <= dict(curves["elastic/world_size"]).items()
