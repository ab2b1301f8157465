"""The energy that a worker uses: counters of its GPUs and of its node's processors, read by its own process.

Counters of processors are those of a node, which others use too. Each worker takes of what they gained the share that
its process has of the node's processor time: so workers of one node together never have more than the node.

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
MOST_WATTS = 2000.0  # of one counter. One that fell as if it had used more was not full, but set to 0 again


@dataclass(frozen=True)
class Counter:
    """Joules that a device has used since some moment. At `range_j` it begins at 0 again; None: it doesn't."""

    joules: float
    range_j: float | None = None


Counters = Mapping[str, Counter]


def gained(before: Counters, after: Counters, passed_s: float) -> float:
    """Joules that were used between two readings, by whoever is in both.

    A counter that fell was full, or was set to 0: then what it has counted since is all that is known.
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
    """The node's processor packages and, where they count apart, its memory; none where they can't be read.

    Cores and what else lies in a package are in its counter already, and so is a package in that of a whole platform
    (`psys`), which few machines have. Since Linux 5.10 the counters are root's, unless the machine says otherwise.
    """
    counters: dict[str, Counter] = {}
    for package in sorted(root.glob("intel-rapl/intel-rapl:*")):
        for zone in (package, *sorted(package.glob("intel-rapl:*"))):
            try:
                name = (zone / "name").read_text().strip()
                if name == "dram" or name.startswith("package"):
                    counters[f"{zone.name} {name}"] = Counter(_joules(zone / "energy_uj"), _range_of(zone))
            except (OSError, ValueError):  # another user's, or a zone of another kind
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
        visible: `CUDA_VISIBLE_DEVICES`, as Ray sets it: indices or UUIDs. None: nobody says which are ours.
        nvml: the module `pynvml`; imported if it isn't given.
    """

    def __init__(self, visible: str | None, nvml: Any = None) -> None:
        self._handles: dict[str, Any] = {}
        # Imported here: 25 ms, and only where there are GPUs.
        self._nvml = nvml = nvml if nvml is not None else importlib.import_module("pynvml")
        try:
            nvml.nvmlInit()
            for name in filter(None, (part.strip() for part in (visible or "").split(","))):
                by = nvml.nvmlDeviceGetHandleByIndex if name.isdigit() else nvml.nvmlDeviceGetHandleByUUID
                self._handles[name] = by(int(name) if name.isdigit() else name)
        except nvml.NVMLError as error:
            self._handles = {}
            log.info("no energy of GPUs: %s", error)

    def read(self) -> Counters:
        """None where there is no NVML, or a GPU of the worker has no such counter."""
        read = self._nvml.nvmlDeviceGetTotalEnergyConsumption
        try:
            return {name: Counter(read(handle) / 1e3) for name, handle in self._handles.items()}
        except self._nvml.NVMLError:
            return {}


@dataclass(frozen=True)
class ProcessorTime:
    """Seconds of processors in use: by this process, and by all of its node."""

    own_s: float
    node_s: float


def read_processor_time() -> ProcessorTime:
    own = psutil.Process().cpu_times()
    return ProcessorTime(own.user + own.system, read_processors().busy_s)


class Tally:
    """Joules of some counters, added up; None until there are two readings."""

    def __init__(self) -> None:
        self.joules: float | None = None
        self._counters: Counters = {}
        self._read_s = 0.0

    def enter(self, counters: Counters, now_s: float, share: float) -> None:
        """Args: `share` is ours of what was used since the last reading."""
        if not counters:  # they can't be read, or not now: what they gain meanwhile is seen at the next reading
            return
        if self._counters:
            joules = share * gained(self._counters, counters, now_s - self._read_s)
            self.joules = joules + (self.joules or 0.0)
        self._counters, self._read_s = counters, now_s


class EnergyMeter:
    """Of this process, from its making on. Nothing runs between two readings.

    One must come before a counter is full twice: at 2,000 W a usual one lasts two minutes.

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
        """What has been used so far; of GPUs, since the first call.

        Args:
            gpus: that the worker reserves. Of a part of one it gets that part of its energy; with 0 none is read.
        """
        now_s = self._clock()
        if gpus:
            self._gpus = self._gpus or Gpus(self._visible, self._nvml)
            self._gpu.enter(self._gpus.read(), now_s, min(1.0, gpus))
        processor, rapl = self._processor_time(), read_rapl(self._root)
        node_s = processor.node_s - self._processor.node_s
        if rapl and node_s > 0:  # else it is too soon to tell shares
            share = min(1.0, max(0.0, (processor.own_s - self._processor.own_s) / node_s))
            self._processor = processor
            self._cpu.enter(rapl, now_s, share)
        return EnergyReading(self._gpu.joules, self._cpu.joules)
