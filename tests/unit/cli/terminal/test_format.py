from dataclasses import replace
from typing import Any

import pytest

from orchestrator.cli.terminal import format
from orchestrator.protocol.status import RunPhase
from tests.unit.cli.statuses import MEASURED, UNMEASURED, status


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (14_058_560, "14.1 MB"),
        (2 * 10**9, "2.0 GB"),
        (10**13, "10000.0 GB"),
    ],
)
def test_size(num_bytes: int, text: str) -> None:
    assert format.size(num_bytes) == text


@pytest.mark.parametrize(("seconds", "text"), [(3.21, "3.2 s"), (61, "1 min 1 s"), (7260, "2 h 1 min")])
def test_duration(seconds: float, text: str) -> None:
    assert format.duration(seconds) == text


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "try training  step 61/180  loss 5.312  val 5.400  12,346 tokens/s  3 workers + 1 standby"),
        (
            {"phase": RunPhase.RESCALING, "workers_now": 2, "standbys": 0, "validation_loss": None},
            "try rescaling  step 61/180  loss 5.312  12,346 tokens/s  2 workers (wanted 3)",
        ),
        (
            {
                "phase": RunPhase.STARTING,
                "step": 0,
                "loss": None,
                "validation_loss": None,
                "tokens_per_second": None,
                "workers_now": 0,
                "why": "waits for data",
            },
            "try starting  step 0/180  waits for data",
        ),
        (  # why it ended is told once, at the end
            {"phase": RunPhase.FINISHING, "validation_loss": None, "workers_now": 0, "why": "rank 1 died"},
            "try finishing  step 61/180  loss 5.312  12,346 tokens/s",
        ),
    ],
    ids=["training", "rescaling", "starting", "finishing"],
)
def test_progress(changes: dict[str, Any], text: str) -> None:
    assert format.progress(status(**changes)) == text


def test_rescale_names_its_first_step_and_its_cost() -> None:
    text = (
        "2 -> 3 workers at step 60: stall 0.62 s, 0 steps lost, 14.1 MB moved, state identical (scheduled for step 60)"
    )
    assert format.rescale(MEASURED) == text
    assert "stall not measured yet" in format.rescale(UNMEASURED)
    assert "identical" not in format.rescale(UNMEASURED)
    moved = replace(MEASURED, from_size=3, to_size=3, experts_moved=7)
    assert format.rescale(moved).startswith("7 experts moved at step 60: stall 0.62 s, 0 steps lost")


def test_an_event_is_shown_without_its_bookkeeping() -> None:
    line = format.event({"seq": 3, "term": 1, "time": 0.0, "kind": "workers_spawned", "workers": ["w0", "w1"]})
    assert line.endswith("workers_spawned     workers=w0,w1")
    assert "term" not in line
    assert "why" not in format.event({"seq": 3, "term": 1, "time": 0.0, "kind": "activated", "why": None})
