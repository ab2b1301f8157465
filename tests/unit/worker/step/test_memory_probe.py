"""Memory figures from the system's files."""

from pathlib import Path

import pytest
import torch

from orchestrator.worker.step import memory_probe
from orchestrator.worker.step.memory_probe import allocated_bytes, room, taken_bytes

CPU = torch.device("cpu")
MB = 1 << 20


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """8,000 MB, half of it available, and no control groups."""
    (tmp_path / "meminfo").write_text(f"MemTotal: {8000 * 1024} kB\nMemFree: 5 kB\nMemAvailable: {4000 * 1024} kB\n")
    (tmp_path / "cgroup").write_text("")
    monkeypatch.setattr(memory_probe, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory_probe, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory_probe, "MOUNT", tmp_path / "fs")
    return tmp_path


def _group(path: Path, limit_file: str, limit: str, stat: str) -> None:
    path.mkdir(parents=True)
    (path / limit_file).write_text(limit + "\n")
    (path / "memory.stat").write_text(stat)


def _usage_and_limit() -> tuple[int, int]:
    there = room(CPU)
    return there.limit_bytes, there.used_bytes


def test_groups_of_one_machine_have_names_of_their_own(machine: Path) -> None:
    names = {room(CPU).place}
    for name in ("one", "two"):
        (machine / "cgroup").write_text(f"0::/{name}\n")
        _second(machine, name, str(3000 * MB), 500 * MB)
        names |= {room(CPU).place, room(CPU).place}
    assert len(names) == 3


def _first(machine: Path, name: str, limit: str, used: int) -> None:
    stat = f"cache {900 * MB}\nrss 1\ntotal_rss {used - MB}\ntotal_shmem {MB}\ntotal_cache {900 * MB}\n"
    _group(machine / "fs" / "memory" / name, "memory.limit_in_bytes", limit, stat)


def _second(machine: Path, name: str, limit: str, used: int) -> None:
    stat = f"anon {used - 3}\nfile {900 * MB}\nshmem 1\nkernel_stack 1\nslab_reclaimable 77\nslab_unreclaimable 1\n"
    _group(machine / "fs" / name, "memory.max", limit, stat)


def test_without_groups_it_is_the_machines(machine: Path) -> None:
    assert _usage_and_limit() == (8000 * MB, 4000 * MB)


def test_a_group_of_the_first_kind_leaves_out_what_can_be_taken_back(machine: Path) -> None:
    (machine / "cgroup").write_text("9:name=systemd:/\n4:cpu,memory:/job/step\n0::/\n")
    _first(machine, "job/step", str(2000 * MB), 500 * MB)
    assert _usage_and_limit() == (2000 * MB, 500 * MB)


def test_a_group_of_the_second_kind_too(machine: Path) -> None:
    (machine / "cgroup").write_text("0::/job\n")
    _second(machine, "job", str(3000 * MB), 500 * MB)
    assert _usage_and_limit() == (3000 * MB, 500 * MB)


def test_the_group_that_leaves_least_counts(machine: Path) -> None:
    (machine / "cgroup").write_text("0::/job/step\n")
    _second(machine, "job/step", str(3000 * MB), 500 * MB)
    (machine / "fs" / "job" / "memory.max").write_text(str(3200 * MB))
    (machine / "fs" / "job" / "memory.stat").write_text(f"anon {1000 * MB}\n")
    assert _usage_and_limit() == (3200 * MB, 1000 * MB)


@pytest.mark.parametrize("limit", ["max", str(1 << 63)])
def test_a_control_group_without_a_limit_is_ignored(machine: Path, limit: str) -> None:
    (machine / "cgroup").write_text("0::/job\n")
    _second(machine, "job", limit, 500 * MB)
    assert _usage_and_limit() == (8000 * MB, 4000 * MB)


def test_in_a_container_the_own_group_is_the_mount(machine: Path) -> None:
    (machine / "cgroup").write_text("4:memory:/docker/0815\n")
    _first(machine, "", str(2000 * MB), 500 * MB)
    assert _usage_and_limit() == (2000 * MB, 500 * MB)


def test_what_this_process_has_grows_with_what_it_takes() -> None:
    before, taken = allocated_bytes(CPU), taken_bytes(CPU)
    held = torch.ones(64 * MB, dtype=torch.uint8)
    assert taken_bytes(CPU) - taken > 60 * MB
    # Python and torch free and take a little of their own in between. Another libc tells nothing: 0.
    assert abs(allocated_bytes(CPU) - before - 64 * MB) < MB or before == 0
    assert int(held[0]) == 1
