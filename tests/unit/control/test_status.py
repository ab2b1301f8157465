"""What a run's status warns of."""

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

from orchestrator.control.account import Account
from orchestrator.control.journal import acquire_epoch
from orchestrator.control.memory import Recollection, RunMemory
from orchestrator.control.status import status_of
from orchestrator.elastic.placement import Placement
from orchestrator.elastic.world import World
from orchestrator.policy.run_state import Note, Observation
from orchestrator.protocol.messages import GenerationPlan, StoreAddress
from tests.unit.policy.imagined import limits_of, record


def _plan(*members: str) -> GenerationPlan:
    placement = Placement.balanced(8, len(members))
    return GenerationPlan(
        epoch=1,
        world=World(0, members),
        placement=placement,
        source=None,
        store_prefix="1/0",
        store_address=StoreAddress("127.0.0.1", 1),
    )


def _warning(run_dir: Path, memory: Recollection) -> str | None:
    seen = Observation(epoch=1, now_s=0.0, target=memory.state.target, progress=memory.progress)
    return status_of(limits_of(), memory, seen, run_dir=run_dir, closed=False).warning


def test_a_run_that_workers_with_other_numerics_have_trained_is_warned_of_until_it_goes_back(tmp_path: Path) -> None:
    memory = RunMemory(tmp_path, acquire_epoch(tmp_path), limits_of())
    account = Account("run", memory, Mock(), Mock(), Mock())
    memory.decided(replace(memory.state, crew=("w0", "w1"), current=_plan("w0")), [])
    memory.absorb([record(step) for step in range(3)], up_to=2)
    account.hear_numerics("w0", json.dumps({"processor": "a"}))
    account.hear_numerics("w1", json.dumps({"processor": "b"}))
    assert _warning(tmp_path, memory) is None  # it stands by
    memory.decided(replace(memory.state, current=_plan("w0", "w1")), [])
    told = _warning(tmp_path, memory)
    assert told is not None and told.startswith(
        "workers have trained whose numerics are not the run's: w1 (processor: a -> b); its bits are others since. For "
    )
    memory.decided(replace(memory.state, crew=("w0",), current=None), [])
    assert _warning(tmp_path, memory) == _warning(tmp_path, Recollection(tmp_path, limits_of())) == told
    memory.decided(memory.state, [Note("resumed", {"token": "t", "step": 2})])
    assert _warning(tmp_path, memory) is None and _warning(tmp_path, Recollection(tmp_path, limits_of())) is None
