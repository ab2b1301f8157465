"""Load of a node: counters read by a process there, and the metric values between two readings."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from orchestrator.storage.caller import Caller, call_here
from orchestrator.tracking.sinks.sink import MetricPoint


@dataclass(frozen=True)
class Reading:
    """Counters of one node. `time` is `time.time()` seconds; cumulative values count from the node's start."""

    node: str
    time: float
    busy_s: float  # processor time in use, summed over cores
    total_s: float
    memory_bytes: int
    disk_percent: float
    sent_bytes: int
    received_bytes: int


@dataclass(frozen=True)
class Processors:
    """Processor time since the node's start, summed over cores: in use, and all."""

    busy_s: float
    total_s: float


def read_processors() -> Processors:
    times = psutil.cpu_times()
    idle_s = times.idle + getattr(times, "iowait", 0.0)
    total_s = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)  # in user's already
    return Processors(total_s - idle_s, total_s)


def read_system(node: str, directory: str, caller: Caller = call_here) -> Reading:
    """A reading of this machine, in about a millisecond. `directory` is in the file system whose usage is read, by
    `caller`."""
    processors = read_processors()
    network = psutil.net_io_counters()
    return Reading(
        node=node,
        time=time.time(),
        busy_s=processors.busy_s,
        total_s=processors.total_s,
        memory_bytes=psutil.virtual_memory().used,
        disk_percent=caller(psutil.disk_usage, directory).percent,
        sent_bytes=network.bytes_sent if network else 0,
        received_bytes=network.bytes_recv if network else 0,
    )


def points_of_readings(before: Reading, after: Reading, step: int) -> Iterator[MetricPoint]:
    """Metric values of a node between two readings, at the newest step."""
    passed_s = after.time - before.time
    counted_s = after.total_s - before.total_s
    if passed_s <= 0 or counted_s <= 0:
        return
    values = {
        "system/cpu_percent": 100.0 * (after.busy_s - before.busy_s) / counted_s,
        "system/memory_bytes": float(after.memory_bytes),
        "system/disk_percent": after.disk_percent,
        "system/sent_bytes_per_second": (after.sent_bytes - before.sent_bytes) / passed_s,
        "system/received_bytes_per_second": (after.received_bytes - before.received_bytes) / passed_s,
    }
    for name, value in values.items():
        yield MetricPoint(name, value, step, after.time, after.node)
