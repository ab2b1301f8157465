"""Energy used by a worker: counters of its GPUs and of its node's processors, read by its own process.

Processor counters cover a whole node, which others use too. Each worker is assigned the share of their increase that
its process has of the node's processor time, so workers of one node together never have more than the node.

RAPL: https://docs.kernel.org/power/powercap/powercap.html. NVML: `nvmlDeviceGetTotalEnergyConsumption`, of Volta and
later.
"""

import importlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from orchestrator.protocol.usage import EnergyReading
from orchestrator.telemetry.node import read_processors

log = logging.getLogger("orchestrator.control")

POWERCAP = Path("/sys/class/powercap")
MOST_WATTS = 2000.0  # of one counter. A fall that would mean more power was a reset to 0, not a wrap


@dataclass(frozen=True)
class Counter:
    """Joules that a device has used since some moment. Wraps to 0 at `range_j`; None: never wraps."""

    joules: float
    range_j: float | None = None


Counters = Mapping[str, Counter]


def gained(before: Counters, after: Counters, passed_s: float) -> float:
    """Joules used between two readings, by the devices in both.

    A counter that fell has wrapped, or was reset to 0: then only what it has counted since is known.
    """
    total = 0.0
    for name in before.keys() & after.keys():
        joules = after[name].joules - before[name].joules
        if joules < 0:
            wrapped = joules + (after[name].range_j or 0.0)
            joules = wrapped if 0 <= wrapped <= MOST_WATTS * passed_s else after[name].joules
        total += joules
    return total


def read_rapl(root: Path = POWERCAP) -> Counters:
    """The node's processor packages and, where counted separately, its memory; empty where they can't be read.

    A package's counter includes its cores and other parts, and that of a whole platform (`psys`), which few machines
    have, includes the packages. Since Linux 5.10 only root reads them, unless the machine is configured otherwise.
    """
    counters: dict[str, Counter] = {}
    for package in sorted(root.glob("intel-rapl/intel-rapl:*")):
        for zone in (package, *sorted(package.glob("intel-rapl:*"))):
            try:
                name = (zone / "name").read_text().strip()
                if name == "dram" or name.startswith("package"):
                    counters[f"{zone.name} {name}"] = Counter(_joules(zone / "energy_uj"), _range_of(zone))
            except (OSError, ValueError):  # not readable by us, or a zone of another kind
                continue
    return counters


def _joules(file: Path) -> float:
    return int(file.read_text()) / 1e6


def _range_of(zone: Path) -> float | None:
    try:
        return _joules(zone / "max_energy_range_uj")
    except (OSError, ValueError):
        return None


class Gpus:
    """Counters of the GPUs that this process may use.

    Args:
        visible: `CUDA_VISIBLE_DEVICES`, as Ray sets it: indices or UUIDs. None: it is unknown which are ours.
        nvml: the module `pynvml`; imported if it isn't given.
    """

    def __init__(self, visible: str | None, nvml: Any = None) -> None:
        self._handles: dict[str, Any] = {}
        # Imported here since it takes 25 ms and is only needed with GPUs.
        self._nvml = nvml = nvml if nvml is not None else importlib.import_module("pynvml")
        try:
            nvml.nvmlInit()
            for name in filter(None, (part.strip() for part in (visible or "").split(","))):
                by = nvml.nvmlDeviceGetHandleByIndex if name.isdigit() else nvml.nvmlDeviceGetHandleByUUID
                self._handles[name] = by(int(name) if name.isdigit() else name)
        except nvml.NVMLError as error:
            self._handles = {}
            log.info("energy of GPUs can't be read: %s", error)

    def read(self) -> Counters:
        """Counters by GPU; empty without NVML, or if a GPU of the worker has no such counter."""
        read = self._nvml.nvmlDeviceGetTotalEnergyConsumption
        try:
            return {name: Counter(read(handle) / 1e3) for name, handle in self._handles.items()}
        except self._nvml.NVMLError:
            return {}


@dataclass(frozen=True)
class ProcessorTime:
    """Processor time used, seconds: by this process, and by its whole node."""

    own_s: float
    node_s: float


def read_processor_time() -> ProcessorTime:
    own = psutil.Process().cpu_times()
    return ProcessorTime(own.user + own.system, read_processors().busy_s)


class Tally:
    """Sum of the joules of some counters; None until there are two readings."""

    def __init__(self) -> None:
        self.joules: float | None = None
        self._counters: Counters = {}
        self._read_s = 0.0

    def enter(self, counters: Counters, now_s: float, share: float) -> None:
        """Add a reading; `share` is our part of the increase since the last one."""
        if not counters:  # they can't be read, at least now: the next reading includes the increase
            return
        if self._counters:
            joules = share * gained(self._counters, counters, now_s - self._read_s)
            self.joules = joules + (self.joules or 0.0)
        self._counters, self._read_s = counters, now_s


class EnergyMeter:
    """Energy of this process, from the meter's creation on. Nothing runs between two readings.

    Readings must be closer than two wraps of a counter: at 2,000 W a usual one wraps after two minutes.

    Args:
        visible: `CUDA_VISIBLE_DEVICES`.
        root: where the kernel shows RAPL.
        nvml: as `Gpus` takes it.
    """

    def __init__(
        self,
        visible: str | None = None,
        root: Path = POWERCAP,
        nvml: Any = None,
        processor_time: Callable[[], ProcessorTime] = read_processor_time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._visible, self._nvml, self._root = visible, nvml, root
        self._processor_time, self._clock = processor_time, clock
        self._gpus: Gpus | None = None
        self._gpu, self._cpu = Tally(), Tally()
        self._processor = processor_time()
        self._cpu.enter(read_rapl(root), clock(), 0.0)

    def read(self, gpus: float) -> EnergyReading:
        """Energy used so far; of GPUs, since the first call.

        Args:
            gpus: number that the worker reserves. A fraction counts that part of one GPU's energy; with 0 none is read.
        """
        now_s = self._clock()
        if gpus:
            self._gpus = self._gpus or Gpus(self._visible, self._nvml)
            self._gpu.enter(self._gpus.read(), now_s, min(1.0, gpus))
        processor, rapl = self._processor_time(), read_rapl(self._root)
        node_s = processor.node_s - self._processor.node_s
        if rapl and node_s > 0:  # else it is too early to compute shares
            share = min(1.0, max(0.0, (processor.own_s - self._processor.own_s) / node_s))
            self._processor = processor
            self._cpu.enter(rapl, now_s, share)
        return EnergyReading(self._gpu.joules, self._cpu.joules)
