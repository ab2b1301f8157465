"""What the micro-batches of a generation take of this worker's memory, gathered step by step."""

import ctypes
import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from orchestrator.protocol.messages import MicroBatchMemory
from orchestrator.worker.step.batches import StepBatches

# -- What this process has taken of memory, and how much there is: what micro-batches are fitted by
# ----------------------------

MEMINFO = Path("/proc/meminfo")
STATUS = Path("/proc/self/status")
BOOT = Path("/proc/sys/kernel/random/boot_id")
GROUPS = Path("/proc/self/cgroup")
MOUNT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Room:
    """Bytes that there are, how many of them all processes have that the system can't take back, and a name for this
    memory, the same for all who share it."""

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
    """What is in use of this process's memory now; 0 where that can't be told."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if _MALLINFO2 is None:
        return 0
    info = _MALLINFO2()
    return int(info.uordblks + info.hblkhd)


def taken_bytes(device: torch.device) -> int:
    """The most that this process has taken since it gave back what was free."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return _of_lines(STATUS, ("RssAnon:", "RssShmem:"))


def give_back(device: torch.device) -> None:
    """Let the system have what is free of what was taken: `taken_bytes` tells then what is in use, and what will be."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(AttributeError, OSError):  # another libc
        ctypes.CDLL(None).malloc_trim(0)


def room(device: torch.device) -> Room:
    """What there is for this process and those beside it."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Room(total, total - free, f"gpu {torch.cuda.get_device_properties(device).uuid}")
    boot = BOOT.read_text().strip() if BOOT.exists() else platform.node()
    total = _of_lines(MEMINFO, ("MemTotal:",))
    machine = Room(total, total - _of_lines(MEMINFO, ("MemAvailable:",)), boot)
    groups = [room for directory in _groups() if (room := _room_of(directory, boot)) is not None]
    return min((machine, *groups), key=lambda room: room.limit_bytes - room.used_bytes)


def _groups() -> list[Path]:
    """Directories of the groups that confine this process's memory, the innermost first."""
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
    """The sum of what a file's lines say of these names."""
    with path.open() as lines:
        return sum(int(words[1]) * unit for line in lines if (words := line.split()) and words[0] in names)


# -- What the micro-batches of a generation take of this worker's memory, gathered step by step
# --------------------------------

SMALLER = 0.9  # times as large as the largest micro-batch of the generation before


class MemoryProbe:
    """Used by the training thread.

    Args:
        device: whose memory micro-batches take: the machine's, or a GPU's.
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
        """Called after a step. Returns what is known of its generation's micro-batches of such rows."""
        last, there = self._newest, room(self._device)
        if last is not None and last.generation != generation and max(feed.padded_tokens) < SMALLER * last.tokens:
            give_back(self._device)  # else what larger micro-batches took would keep these from growing again
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
