"""A short chaos run: faults of storage and of processes, mixed. `python -m tests.chaos` makes long ones."""

from pathlib import Path

import pytest

from tests.chaos.checks import Checks
from tests.chaos.schedule import PACES, schedule_of
from tests.chaos.suite import run_chaos

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(900)]

SEED, NUM_FAULTS = 30552, 5  # kills while storage fails, so that the run goes on from few faults; two requests too
PATIENCE_S = 150.0


def test_faults_of_storage_and_processes_break_no_invariant(tmp_path: Path) -> None:
    checks = Checks()
    run_chaos(schedule_of(SEED, NUM_FAULTS, PACES["short"]), checks, tmp_path, PATIENCE_S)
    replay = f"replay: python -m tests.chaos --seed {SEED} --faults {NUM_FAULTS} --schedule short"
    assert checks.failures == [] and checks.passed >= 3 * NUM_FAULTS, replay
