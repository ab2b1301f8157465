"""Energy used by a run's workers, by method of measurement. Pure."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.policy.report.attempts import Attempt
from orchestrator.protocol.events.workers import EnergyRead, WorkersSpawned
from orchestrator.protocol.usage import EnergyReading

JOULES_PER_KWH = 3.6e6


class EnergyMethod(StrEnum):
    """Source of an energy figure."""

    NVML = "NVML"
    RAPL = "RAPL"
    MODEL = "a model"


MEASURES = {
    EnergyMethod.NVML: "the workers' GPUs alone, by their counters",
    EnergyMethod.RAPL: "processors and, where it counts apart, memory of the workers' nodes, by counters and each "
    "worker's share of the processor time in use",
}
NOT_MEASURED = "not measured: no worker could read counters of NVML or RAPL; --watts-per-worker W models it"


@dataclass(frozen=True)
class Energy:
    """Energy by one method. Methods measure different things, or the same thing in different ways: `note` names what is
    measured, and how much of it is known."""

    method: EnergyMethod
    kwh: float
    note: str


def energy_of(attempts: Sequence[Attempt], held_hours: float, watts_per_worker: float | None) -> tuple[Energy, ...]:
    """Energy by each method with data, measured ones first; empty without data.

    Args:
        held_hours: worker-hours, those of standbys included.
        watts_per_worker: for the modelled figure; None for no such figure.
    """
    workers = [worker for attempt in attempts for worker in _readings(attempt)]
    found = []
    for method, readings in (
        (EnergyMethod.NVML, [reading.gpu_j for reading in workers]),
        (EnergyMethod.RAPL, [reading.cpu_j for reading in workers]),
    ):
        joules = [each for each in readings if each is not None]
        if joules:
            note = (
                f"measured: {MEASURES[method]}; of {len(joules)} of {len(workers)} workers, to each one's last reading"
            )
            found.append(Energy(method, math.fsum(joules) / JOULES_PER_KWH, note))
    if watts_per_worker is not None:
        note = f"not measured: {watts_per_worker:g} W per worker x worker-hours held"
        found.append(Energy(EnergyMethod.MODEL, watts_per_worker * held_hours / 1000, note))
    return tuple(found)


def _readings(attempt: Attempt) -> Iterator[EnergyReading]:
    """The newest reading of each worker of the attempt; readings count from the worker's start."""
    newest: dict[str, EnergyReading] = {}
    for entry in attempt.events:
        match entry.event:
            case WorkersSpawned(workers):
                newest |= dict.fromkeys(workers, EnergyReading())
            case EnergyRead(readings):
                newest |= readings
    yield from newest.values()
