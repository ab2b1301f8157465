"""What is exported for Prometheus: which series with which values, and that a failure stays here."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.controller.run_metrics import collapse, values_of_run
from orchestrator.metrics.metric import Metric, MetricKind
from orchestrator.metrics.registry import DECLARED, metric
from orchestrator.policy.state.progress import Progress
from orchestrator.policy.state.run_state import Observation
from orchestrator.protocol.changes import changed
from orchestrator.protocol.events.generations import GenerationAborted, Rescaled
from orchestrator.protocol.events.notices import ReplayChecked, StateDiffers
from orchestrator.protocol.events.run import Resumed, Submitted
from orchestrator.protocol.events.training import CheckpointCommitted
from orchestrator.protocol.expert_load import ExpertLoad
from orchestrator.protocol.status import RunPhase
from orchestrator.protocol.usage import Traffic
from orchestrator.run_records.journaled_run import JournaledRun
from orchestrator.spec.model import ModelSpec
from orchestrator.storage.condition import StorageCondition
from orchestrator.storage.tasks import run_inline
from orchestrator.telemetry.prometheus import EVERY_S, Exporter
from orchestrator.telemetry.step_metrics import points_of_steps
from orchestrator.tracking.sinks.sink import MetricPoint
from tests.unit.policy.imagined import limits_of, record

Values = dict[tuple[str, str], float]
MODEL = ModelSpec(n_routed_experts=8, num_experts_per_tok=2)


def recorder(values: Values) -> Callable[[Metric], "Recorded"]:
    return lambda declared: Recorded(declared, values)


class Recorded:
    """A series that remembers its newest values."""

    def __init__(self, declared: Metric, values: Values) -> None:
        self._declared, self._values = declared, values

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert isinstance(value, float) and tags.pop("run") == "r1"
        assert set(tags) == ({self._declared.label} if self._declared.label else set())
        self._values[self._declared.name, next(iter(tags.values()), "")] = value


def test_amounts_begin_at_0_and_add_up_while_the_rest_is_the_newest() -> None:
    values: Values = {}
    exporter = Exporter("r1", recorder(values))
    assert values == {(m.name, ""): 0.0 for m in DECLARED if m.kind is MetricKind.AMOUNT}
    traffic = {"dispatch": Traffic(raw=20, payload=9, index=1)}
    steps = [changed(record(step), traffic=traffic) for step in range(3)]
    exporter.show(points_of_steps(Progress(), steps))
    assert values["comm/dispatch_bytes", ""] == 30.0 and values["comm/raw_bytes", ""] == 60.0
    assert values["train/tokens", ""] == 300.0 and values["train/loss", ""] == steps[-1].loss
    exporter.show([MetricPoint("elastic/moved_bytes", 7.0, 1, 0.0), MetricPoint("elastic/moved_bytes", 5.0, 2, 0.0)])
    assert values["elastic/moved_bytes", ""] == 12.0


def test_every_node_has_its_own_value_and_shares_are_of_one() -> None:
    values: Values = {}
    exporter = Exporter("r1", recorder(values))
    exporter.show([MetricPoint("system/cpu_percent", cpu, 1, 0.0, node) for node, cpu in (("a", 50.0), ("b", 75.0))])
    assert values["system/cpu_percent", "a"] == 0.5 and values["system/cpu_percent", "b"] == 0.75


def test_a_run_is_in_one_phase_and_its_storage_in_one_condition(tmp_path: Path) -> None:
    values: Values = {}
    exporter = Exporter("r1", recorder(values))
    assert exporter.is_due(100.0)
    exporter.show_run(100.0, {"run/wanted_steps": 12}, RunPhase.TRAINING, StorageCondition.FULL)
    exporter.show_run(101.0, {"run/wanted_steps": 12}, RunPhase.RECOVERING, StorageCondition.WELL)
    assert not exporter.is_due(101.0 + 0.9 * EVERY_S) and exporter.is_due(101.0 + EVERY_S)
    phases = {label: value for (name, label), value in values.items() if name == "run/phase"}
    assert phases == {phase: float(phase == "recovering") for phase in RunPhase if not phase.ended}
    assert values["run/wanted_steps", ""] == 12.0
    conditions = {label: value for (name, label), value in values.items() if name == "run/storage"}
    assert conditions == {condition: float(condition == "well") for condition in StorageCondition}


def test_a_failed_export_is_logged_once_and_raises_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def broken(declared: Metric) -> Recorded:
        raise RuntimeError("no agent")

    with caplog.at_level(logging.ERROR):
        exporter = Exporter("r1", broken)
        exporter.show([MetricPoint("train/loss", 1.0, 1, 0.0)])
        exporter.show_run(0.0, {"run/wanted_steps": 12}, RunPhase.TRAINING, StorageCondition.FULL)
    assert len(caplog.records) == 1 and "no agent" in caplog.text


def test_a_run_at_its_beginning_under_way_and_resumed(tmp_path: Path) -> None:
    limits = limits_of(steps=12)
    memory = JournaledRun(tmp_path, limits)
    submitted = run_inline(memory.note(Submitted("run", 2))).time

    def values() -> dict[str, float]:
        seen = Observation(term=1, now_s=0.0, target=memory.state.target, progress=memory.progress)
        found = values_of_run(limits, MODEL, memory, seen)
        assert all(metric(name).live or metric(name).kind is MetricKind.COUNTER for name in found)
        return found

    first = values()
    assert first["run/finished_steps"] == first["run/committed_steps"] == first["train/tokens"] == 0
    assert first["run/committed_time"] == first["run/checkpoint_time"] == submitted
    assert first["elastic/workers_wanted"] == 2 and first["elastic/quarantined_nodes"] == 0

    vote_time = submitted + 50.0
    run_inline(
        memory.absorb(
            [changed(record(0), experts=ExpertLoad(worst_violation=1.5), applied=False, vote_time=vote_time)], up_to=0
        )
    )
    checkpoint = run_inline(memory.note(CheckpointCommitted(0, "/c/0", 0, ""))).time
    later = values()
    assert later["run/committed_steps"] == 1 and later["run/committed_time"] == vote_time
    assert later["run/checkpoint_time"] == checkpoint >= submitted
    assert later["moe/collapse"] == 0.5 and later["train/skipped"] == 1
    assert later["verify/checks"] == later["verify/differences"] == 0
    run_inline(
        memory.decided(memory.state, [ReplayChecked("w1", 0, 0, equal=False), StateDiffers(0, ("loss",), (), (), ())])
    )
    assert values()["verify/checks"] == values()["verify/differences"] == 1
    assert later["elastic/rescales"] == later["elastic/recoveries"] == 0
    run_inline(memory.decided(memory.state, [Rescaled(1, 2, 3, 0, ""), *2 * [GenerationAborted(1, 0, "")]]))
    assert (values()["elastic/rescales"], values()["elastic/recoveries"]) == (1, 2)

    successor = JournaledRun(tmp_path, limits)
    assert successor.newest_times == memory.newest_times and successor.times == memory.times
    resumed = run_inline(successor.note(Resumed("t", 0, None, 2))).time
    memory = JournaledRun(tmp_path, limits)
    assert values()["run/checkpoint_time"] == resumed and values()["train/skipped"] == 1
    assert values()["verify/checks"] == values()["verify/differences"] == 1
    assert (values()["elastic/rescales"], values()["elastic/recoveries"]) == (1, 2)  # what happened isn't undone


@pytest.mark.parametrize(
    ("experts", "top_k", "worst_violation", "share"), [(8, 2, 3.0, 1.0), (8, 2, 0.0, 0.0), (1, 1, 0.0, 0.0)]
)
def test_collapse(experts: int, top_k: int, worst_violation: float, share: float) -> None:
    model, load = ModelSpec(n_routed_experts=4, num_experts_per_tok=top_k), ExpertLoad(worst_violation=worst_violation)
    assert collapse(replace(load, num_experts=experts), model) == share
