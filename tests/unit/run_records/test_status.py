"""What a run's status warns of."""

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from orchestrator.controller.recorder import StepRecorder
from orchestrator.controller.startup import OpenedRun
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.world import World
from orchestrator.policy.state.run_state import Observation
from orchestrator.protocol.events.notices import ExpertsCollapsed
from orchestrator.protocol.events.run import Resumed
from orchestrator.protocol.expert_load import ExpertLoad
from orchestrator.protocol.messages import GenerationPlan, StoreAddress
from orchestrator.protocol.step_record import StepRecord
from orchestrator.protocol.worker_phase import Phase
from orchestrator.protocol.worker_report import ProcessReport, Report
from orchestrator.run_records.journaled_run import JournaledRun
from orchestrator.run_records.run_history import RunHistory, user_events
from orchestrator.run_records.status import status_of
from orchestrator.spec.job import JobSpec
from orchestrator.spec.model import ModelSpec
from orchestrator.storage.tasks import run_inline
from tests.unit.policy.imagined import limits_of, record

MODEL = ModelSpec(n_routed_experts=8, num_experts_per_tok=2)


def _plan(*members: str) -> GenerationPlan:
    placement = ExpertPlacement.balanced(8, len(members))
    return GenerationPlan(
        term=1,
        world=World(0, members),
        placement=placement,
        source=None,
        store_prefix="1/0",
        store_address=StoreAddress("127.0.0.1", 1),
    )


def _report(numerics: str) -> Report:
    return Report("w0", 1, 0, Phase.TRAINING, -1, -1, -1, process=ProcessReport(numerics=numerics))


def _warning(run_dir: Path, memory: RunHistory) -> str | None:
    seen = Observation(term=1, now_s=0.0, target=memory.state.target, progress=memory.progress)
    return status_of(limits_of(), MODEL, memory, seen, run_dir=run_dir, closed=False).warning


def _run(run_dir: Path, memory: JournaledRun) -> OpenedRun:
    return OpenedRun("run", run_dir, JobSpec(name="run", model=MODEL), limits_of(), memory)


def test_a_run_that_workers_with_other_numerics_have_trained_is_warned_of_until_it_goes_back(tmp_path: Path) -> None:
    memory = JournaledRun(tmp_path, limits_of())
    account = StepRecorder(_run(tmp_path, memory), Mock(), Mock(), Mock())
    run_inline(memory.decided(replace(memory.state, worker_group=("w0", "w1"), current=_plan("w0")), []))
    run_inline(memory.absorb([record(step) for step in range(3)], up_to=2))
    run_inline(account.hear("w0", _report(numerics=json.dumps({"processor": "a"}))))
    run_inline(account.hear("w1", _report(numerics=json.dumps({"processor": "b"}))))
    assert _warning(tmp_path, memory) is None  # it stands by
    run_inline(memory.decided(replace(memory.state, current=_plan("w0", "w1")), []))
    told = _warning(tmp_path, memory)
    assert told is not None and told.startswith(
        "workers whose numerics differ from the run's have trained: w1 (processor: a -> b); its bits differ since. To "
    )
    run_inline(memory.decided(replace(memory.state, worker_group=("w0",), current=None), []))
    assert _warning(tmp_path, memory) == _warning(tmp_path, RunHistory(tmp_path, limits_of())) == told
    run_inline(memory.decided(memory.state, [Resumed("t", 2, None, 2)]))
    assert _warning(tmp_path, memory) is None and _warning(tmp_path, RunHistory(tmp_path, limits_of())) is None


def _steps(first: int, stop: int, violation: float, swing: float = 0.0) -> list[StepRecord]:
    load = ExpertLoad(worst_violation=violation, worst_layer=1, swing=swing)
    return [record(step, experts=load) for step in range(first, stop)]


def test_a_collapse_is_an_event_and_a_warning_until_it_is_over(tmp_path: Path) -> None:
    memory = JournaledRun(tmp_path, limits_of())
    tracker = Mock()
    account = StepRecorder(_run(tmp_path, memory), Mock(), tracker, Mock())
    seen = Observation(
        term=1, now_s=0.0, target=memory.state.target, progress=memory.progress, checkpointed=(0, 10_000)
    )

    run_inline(account.enter(_steps(0, 60, violation=0.2), lambda: seen))
    assert _warning(tmp_path, memory) is None
    run_inline(account.enter(_steps(60, 100, violation=2.9), lambda: seen))
    told = _warning(tmp_path, memory)
    assert told is not None and told.startswith(
        "MoE layer 1 has collapsed since step 60, most of its tokens go to the same experts: its MaxVio was 2.90 of "
        "3.00 possible, where at most 1.50 is expected. In the job of a new run, raise model.bias_update_speed, which "
    )
    run_inline(account.enter(_steps(100, 110, violation=2.8), lambda: seen))  # it is an event once
    assert _warning(tmp_path, memory) == _warning(tmp_path, RunHistory(tmp_path, limits_of())) == told
    run_inline(account.enter(_steps(110, 140, violation=0.1, swing=0.9), lambda: seen))
    told = _warning(tmp_path, memory)
    assert told is not None and told.startswith("the loads of experts swing since step 110: 90% of the experts")
    assert "lower model.bias_update_speed, which is 0.5" in told and "MoE layer" not in told
    run_inline(account.enter(_steps(140, 170, violation=0.1), lambda: seen))
    assert _warning(tmp_path, memory) is None and _warning(tmp_path, RunHistory(tmp_path, limits_of())) is None
    kinds = ["experts_collapsed", "experts_even", "loads_swing", "loads_steady"]
    assert [(e["kind"], e["step"]) for e in user_events(tmp_path)] == list(zip(kinds, (60, 110, 110, 140), strict=True))
    assert [call.args[0].event.kind for call in tracker.publish_event.call_args_list] == kinds


def test_a_run_that_goes_back_before_a_collapse_is_not_warned_of_it(tmp_path: Path) -> None:
    memory = JournaledRun(tmp_path, limits_of())
    run_inline(memory.absorb([record(step) for step in range(100)], up_to=10_000))
    collapse = ExpertsCollapsed(60, layer=0, max_violation=3.0)
    run_inline(memory.note(collapse))
    memory.troubles = memory.troubles.after(collapse)
    for step, has_collapsed in ((80, True), (40, False)):
        run_inline(memory.decided(memory.state, [Resumed("t", step, None, 2)]))
        for remembered in (memory, RunHistory(tmp_path, limits_of())):
            assert (_warning(tmp_path, remembered) is not None) is has_collapsed


@pytest.mark.parametrize(("publish", "shown"), [("finished", 4), ("committed", 1)])
def test_finished_steps_that_are_not_committed_are_counted(tmp_path: Path, publish: str, shown: int) -> None:
    limits = limits_of(publish=publish)
    memory = JournaledRun(tmp_path, limits)
    run_inline(memory.decided(replace(memory.state, worker_group=("w0",), current=_plan("w0")), []))
    run_inline(memory.absorb([record(step) for step in range(3)], up_to=2))
    reports = {"w0": Report("w0", 1, 0, Phase.TRAINING, 0, 3, 0)}
    seen = Observation(term=1, now_s=0.0, target=memory.state.target, progress=memory.progress, reports=reports)
    status = status_of(limits, MODEL, memory, seen, run_dir=tmp_path, closed=False)
    assert (status.step, status.uncommitted) == (3, shown)
