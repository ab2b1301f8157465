"""Invariants of the chaos suite: each finds what breaks it."""

import ast
from pathlib import Path
from typing import Any

from tests.chaos import invariants
from tests.chaos.checks import Checks
from tests.chaos.invariants import count_faults, end_faults, is_replaying, loss_faults, step_faults, storage_faults

OWN = ("journal", "checkpoints", "invariants", "checks", "observer", "cluster", "player", "schedule")


def _steps(*steps: int, loss: float = 1.0) -> list[dict[str, Any]]:
    """Events of which each records two steps, or one."""
    records = [{"step": step, "loss": loss, "update": {"grad_norm": 0.5}} for step in steps]
    return [{"kind": "steps", "records": records[at : at + 2]} for at in range(0, len(records), 2)]


def test_steps_that_are_recorded_once_and_in_order_are_right() -> None:
    assert step_faults([*_steps(0, 1, 2), {"kind": "queued"}, *_steps(3)]) == []
    assert count_faults(_steps(0, 1, 2), 3) == []


def test_a_lost_step_is_found() -> None:
    assert step_faults(_steps(0, 1, 3)) == ["step 3 is recorded where step 2 follows"]
    assert step_faults(_steps(1, 2)) == ["step 1 is recorded where step 0 follows"]
    assert count_faults(_steps(0, 1), 3) == ["2 steps are recorded, the run claims 3"]


def test_a_step_that_is_recorded_again_or_out_of_order_is_found() -> None:
    assert step_faults(_steps(0, 1, 1, 2)) == ["step 1 is recorded where step 2 follows"]
    assert step_faults(_steps(0, 2, 1, 3))


def test_a_last_step_without_a_checkpoint_is_found() -> None:
    asked, lost = {"kind": "target"}, {"kind": "rolled_back"}
    assert end_faults([*_steps(0, 1), asked, *_steps(2)], [0, 2]) == []
    assert end_faults([*_steps(0, 1), lost, asked, *_steps(2)], [1]) == ["step 2 is the last one, checkpoints: [1]"]
    assert end_faults(_steps(0, 1), []) == ["step 1 is the last one, checkpoints: []"]
    assert end_faults([*_steps(0, 1, 2), asked, lost], [1]) == []


def test_a_run_is_replaying_until_it_records_steps_of_a_later_generation() -> None:
    back, activated = {"kind": "rolled_back"}, {"kind": "activated"}
    assert not is_replaying([activated, *_steps(0, 1)])
    assert is_replaying([activated, *_steps(0, 1), back])
    assert is_replaying([*_steps(0, 1), back, *_steps(2), activated, {"kind": "state"}])  # what others had done
    assert not is_replaying([*_steps(0, 1), back, *_steps(2), activated, *_steps(3)])
    assert is_replaying([*_steps(0, 1), back, activated, *_steps(2), back, activated])


def test_a_worker_or_a_step_that_storage_costs_is_found() -> None:
    assert storage_faults([{"kind": "storage_fails"}, {"kind": "checkpoint"}, {"kind": "storage_works"}]) == []
    for kind in ("worker_lost", "generation_aborted", "rolled_back"):
        assert storage_faults([{"kind": kind, "why": "it"}]) == [f"{kind}:  it"]


def test_another_loss_is_found() -> None:
    assert loss_faults(_steps(0, 1), _steps(0, 1)) == []
    other = [*_steps(0, 1), *_steps(2, loss=1.0 + 2**-52), *_steps(3)]
    assert loss_faults(_steps(0, 1, 2, 3), other) == ["1 steps differ, the first is step 2"]


def test_another_validation_loss_is_found_but_not_one_that_is_in_one_run_only() -> None:
    validated, others = _steps(0, 1), _steps(0, 1)
    validated[0]["records"][1]["validation_loss"] = 2.0
    assert loss_faults(validated, others) == [] == loss_faults(others, validated)
    others[0]["records"][1]["validation_loss"] = 2.5
    assert loss_faults(validated, others) == ["1 steps differ, the first is step 1"]


def test_a_failed_check_is_counted_and_shown() -> None:
    lines: list[str] = []
    checks = Checks(lines.append)
    checks.check("one", [])
    checks.check("other", ["this", "that"])
    assert checks.summary() == "1 passed, 1 failed" and checks.failures == ["other: this; that"]
    assert "FAILED other: this; that" in lines[0]


def test_invariants_share_no_code_with_the_product() -> None:
    tests = Path(invariants.__file__).parents[1]
    for path in [*(tests / "chaos" / f"{name}.py" for name in OWN), tests / "support" / "worker_processes.py"]:
        tree = ast.parse(path.read_text())
        imported = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        imported |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
        imported -= {"tests.support.worker_processes"}
        assert not [module for module in imported if module.startswith(("orchestrator", "tests.support"))], path
