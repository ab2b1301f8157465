"""What a run's status warns of."""

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

from orchestrator.control.account import Account
from orchestrator.control.journal import acquire_epoch
from orchestrator.control.memory import RunMemory
from orchestrator.control.status import status_of
from orchestrator.policy.run_state import Observation
from tests.unit.policy.imagined import limits_of


def test_a_worker_with_other_numerics_is_warned_of_as_long_as_it_is_there(tmp_path: Path) -> None:
    memory = RunMemory(tmp_path, acquire_epoch(tmp_path), limits_of())
    account = Account("run", memory, Mock(), Mock(), Mock())

    def warning() -> str | None:
        seen = Observation(epoch=1, now_s=0.0, target=memory.state.target, progress=memory.progress)
        return status_of(limits_of(), memory, seen, run_dir=tmp_path, closed=False).warning

    memory.decided(replace(memory.state, crew=("w0", "w1")), [])
    account.hear_numerics("w0", json.dumps({"processor": "a"}))
    assert warning() is None
    account.hear_numerics("w1", json.dumps({"processor": "b"}))
    assert warning() == (
        "workers whose numerics are not the run's: w1 (processor: a -> b); while they train its bits are others"
    )
    memory.decided(replace(memory.state, crew=("w0",)), [])
    assert warning() is None
