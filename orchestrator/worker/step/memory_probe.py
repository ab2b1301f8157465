"""Memory use of a generation's micro-batches on this worker, measured step by step."""

import ctypes
import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from orchestrator.protocol.worker_report import MicroBatchMemory
from orchestrator.worker.step.batches import StepBatches

# -- Memory that this process uses and memory that is available: the inputs to micro-batch sizing ----------------------

MEMINFO = Path("/proc/meminfo")
STATUS = Path("/proc/self/status")
BOOT = Path("/proc/sys/kernel/random/boot_id")
GROUPS = Path("/proc/self/cgroup")
MOUNT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Room:
    """Bytes of a memory, bytes of it used by all processes that the system can't reclaim, and a name of this memory,
    the same for all processes that share it."""

    limit_bytes: int
    used_bytes: int
    place: str


class _MallocInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")),
        *((name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")),
    ]


def _mallinfo2() -> "ctypes._NamedFuncPointer | None":
    try:
        function = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):  # another libc, or an old one
        return None
    function.restype = _MallocInfo
    return function


_MALLINFO2 = _mallinfo2()


def allocated_bytes(device: torch.device) -> int:
    """Bytes of this process's memory in use now; 0 where unknown."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if _MALLINFO2 is None:
        return 0
    info = _MALLINFO2()
    return int(info.uordblks + info.hblkhd)


def taken_bytes(device: torch.device) -> int:
    """Most bytes that this process has taken since the last `give_back`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return _of_lines(STATUS, ("RssAnon:", "RssShmem:"))


def give_back(device: torch.device) -> None:
    """Return free memory to the system: `taken_bytes` then counts what is in use, and what will be."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(AttributeError, OSError):  # another libc
        ctypes.CDLL(None).malloc_trim(0)


def room(device: torch.device) -> Room:
    """Memory available to this process and those beside it."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Room(total, total - free, f"gpu {torch.cuda.get_device_properties(device).uuid}")
    boot = BOOT.read_text().strip() if BOOT.exists() else platform.node()
    total = _of_lines(MEMINFO, ("MemTotal:",))
    machine = Room(total, total - _of_lines(MEMINFO, ("MemAvailable:",)), boot)
    groups = [room for directory in _groups() if (room := _room_of(directory, boot)) is not None]
    return min((machine, *groups), key=lambda room: room.limit_bytes - room.used_bytes)


def _groups() -> list[Path]:
    """Directories of the control groups that limit this process's memory, the innermost first."""
    found = []
    for line in GROUPS.read_text().splitlines() if GROUPS.exists() else ():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            mount = MOUNT / "memory"
        elif not controllers:
            mount = MOUNT
        else:
            continue
        group = mount / path.lstrip("/")
        while group != mount:
            found.append(group)
            group = group.parent
        found.append(mount)  # in a container its own group is often mounted here
    return found


def _room_of(group: Path, boot: str) -> Room | None:
    """None for a group without a limit."""
    for name, counted in (
        ("memory.max", ("anon", "shmem", "kernel_stack", "slab_unreclaimable")),
        ("memory.limit_in_bytes", ("total_rss", "total_shmem")),
    ):
        try:
            limit = (group / name).read_text().strip()
            used = _of_lines(group / "memory.stat", counted, unit=1)
        except OSError:
            continue
        if limit.isdecimal() and int(limit) < 1 << 60:
            return Room(int(limit), used, f"{boot} {group.stat().st_ino}")
    return None


def _of_lines(path: Path, names: tuple[str, ...], unit: int = 1024) -> int:
    """Sum of a file's values for these names, times `unit`."""
    with path.open() as lines:
        return sum(int(words[1]) * unit for line in lines if (words := line.split()) and words[0] in names)


# -- Memory use of a generation's micro-batches, measured step by step -------------------------------------------------

SMALLER = 0.9  # times the size of the previous generation's largest micro-batch


class MemoryProbe:
    """Probe used by the training thread.

    Args:
        device: whose memory micro-batches use: the machine's, or a GPU's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept = self._before = 0
        self._newest: MicroBatchMemory | None = None

    def begin_pass(self) -> None:
        """Called before the forward pass of a micro-batch."""
        self._before = allocated_bytes(self._device)

    def end_forward(self) -> None:
        """Called between a micro-batch's forward and its backward pass."""
        self._kept = max(self._kept, allocated_bytes(self._device) - self._before)

    def end_step(self, generation: int, feed: StepBatches) -> MicroBatchMemory:
        """Called after a step. Returns measurements of its generation's micro-batches of this sequence length."""
        last, there = self._newest, room(self._device)
        if last is not None and last.generation != generation and max(feed.padded_tokens) < SMALLER * last.tokens:
            give_back(self._device)  # else memory taken by larger micro-batches would keep these from growing again
            there = room(self._device)
        is_first = last is None or (last.generation, last.sequence_length) != (generation, feed.sequence_length)
        self._newest = MicroBatchMemory(
            generation=generation,
            sequence_length=feed.sequence_length,
            steps=1 if is_first or last is None else last.steps + 1,
            tokens=max([0 if is_first or last is None else last.tokens, *feed.padded_tokens]),
            num_micro_batches=feed.num_micro_batches,
            kept_bytes=max(self._kept, 0 if is_first or last is None else last.kept_bytes),
            resident_bytes=taken_bytes(self._device),
            limit_bytes=there.limit_bytes,
            used_bytes=there.used_bytes,
            place=there.place,
            is_gpu=self._device.type == "cuda",
        )
        self._kept = 0
        return self._newest
