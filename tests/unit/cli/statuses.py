"""A run's status for tests, with changes."""

from typing import Any

from orchestrator.protocol.status import Rescale, RunPhase, RunStatus

MEASURED = Rescale(1, 2, 3, 59, "scheduled for step 60", 14_058_560, True, 0.618)
UNMEASURED = Rescale(2, 3, 2, 119, "scheduled for step 120", 9_683_424, None, None)


def status(**changes: Any) -> RunStatus:
    fields: dict[str, Any] = {
        "run_id": "try",
        "run_dir": "/runs/try",
        "phase": RunPhase.TRAINING,
        "why": "",
        "step": 61,
        "steps": 180,
        "workers_wanted": 3,
        "workers_now": 3,
        "standbys": 1,
        "generation": 1,
        "loss": 5.3124,
        "first_loss": 7.648,
        "validation_loss": 5.4,
        "first_validation_loss": 7.57,
        "tokens_per_second": 12345.6,
        "rescales": (),
        "checkpoint": None,
        "checkpoint_step": None,
        "tracking_url": None,
        "error": None,
        "submitted_time": 1000.0,
        "started_time": 1010.0,
        "ended_time": None,
    }
    return RunStatus(**fields | changes)
