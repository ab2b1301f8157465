"""What a process takes of memory, from Linux' own accounts."""

from pathlib import Path


def proportional_bytes(pid: int | str = "self") -> int:
    """Its proportional share (PSS): pages that several processes share count in parts."""
    return _kilobytes(Path(f"/proc/{pid}/smaps_rollup"), "Pss:") * 1024


def peak_bytes(pid: int | str = "self") -> int:
    """The most that was resident at one time."""
    return _kilobytes(Path(f"/proc/{pid}/status"), "VmHWM:") * 1024


def _kilobytes(file: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith(name))
