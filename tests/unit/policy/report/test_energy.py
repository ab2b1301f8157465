"""Energy by method, from the readings in a journal."""

import pytest

from orchestrator.policy.report.attempts import attempts_of
from orchestrator.policy.report.energy import Energy, EnergyMethod, energy_of
from orchestrator.protocol.events.workers import EnergyRead
from orchestrator.protocol.usage import EnergyReading
from tests.unit.policy.stories import Story

KWH = 3.6e6  # joules


def found(story: Story, watts: float | None = None) -> dict[EnergyMethod, Energy]:
    return {energy.method: energy for energy in energy_of(attempts_of(story.events), 2.0, watts)}


def test_the_newest_reading_of_each_worker_counts_the_dead_and_released_included() -> None:
    story = Story()
    story.start(3)
    story.tell(
        EnergyRead(
            {"w0": EnergyReading(cpu_j=1 * KWH), "w1": EnergyReading(cpu_j=1 * KWH), "w2": EnergyReading(cpu_j=1 * KWH)}
        )
    )
    story.train(5)
    story.kill()  # w2
    story.tell(EnergyRead({"w0": EnergyReading(cpu_j=5 * KWH)}))  # w1 had nothing new to say
    rapl = found(story)[EnergyMethod.RAPL]
    assert rapl.kwh == pytest.approx(5 + 1 + 1)
    assert rapl.note.startswith("measured: processors") and "of 3 of 3 workers" in rapl.note


def test_each_attempt_counts_its_own_workers() -> None:
    story = Story()
    story.start(1)
    story.tell(EnergyRead({"w0": EnergyReading(gpu_j=2 * KWH, cpu_j=1 * KWH)}))
    story.train(5)
    story.end("paused")
    story.tell(EnergyRead({"w0": EnergyReading(gpu_j=3 * KWH, cpu_j=1 * KWH)}))  # written down after the end
    story.resume(2)
    story.tell(EnergyRead({"w1": EnergyReading(gpu_j=4 * KWH)}))
    told = found(story, watts=100.0)
    assert list(told) == [EnergyMethod.NVML, EnergyMethod.RAPL, EnergyMethod.MODEL]
    assert told[EnergyMethod.NVML].kwh == pytest.approx(7.0) and "of 2 of 3 workers" in told[EnergyMethod.NVML].note
    assert told[EnergyMethod.RAPL].kwh == pytest.approx(1.0) and "of 1 of 3 workers" in told[EnergyMethod.RAPL].note
    assert told[EnergyMethod.MODEL].kwh == pytest.approx(0.2)
    assert told[EnergyMethod.MODEL].note.startswith("not measured")


def test_without_readings_there_is_no_figure() -> None:
    story = Story()
    story.start(2)
    story.train(5)
    assert found(story) == {}
