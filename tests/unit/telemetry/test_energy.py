"""Counters of energy: what they gain, which of them count, and whose it is. There is no real one on a test machine."""

from pathlib import Path
from typing import Any

import pynvml
import pytest

from orchestrator.cluster.actors import Host
from orchestrator.protocol.usage import EnergyReading
from orchestrator.telemetry.energy import Counter, EnergyMeter, Gpus, ProcessorTime, gained, read_rapl
from tests.support.powercap import RANGE_UJ, write_zone


class FakeNvml:
    """A machine of GPUs, as `pynvml` shows it. `joules` is by index; a GPU without a counter has None."""

    NVMLError = pynvml.NVMLError

    def __init__(self, joules: list[float | None]) -> None:
        self.joules = joules

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index >= len(self.joules):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return self.nvmlDeviceGetHandleByIndex(int(uuid.removeprefix("GPU-")))

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        joules = self.joules[handle]
        if joules is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return round(joules * 1e3)


class Machine:
    """A node with one package, processes on it, and a clock."""

    def __init__(self, root: Path) -> None:
        self.root, self.now_s, self.node_s = root, 100.0, 5000.0
        self.own_s: dict[str, float] = {}
        self.counter = write_zone(root, "intel-rapl:0", "package-0", 0)

    def meter(self, process: str, **changes: Any) -> EnergyMeter:
        self.own_s[process] = 1.0
        return EnergyMeter(
            root=self.root,
            processor_time=lambda: ProcessorTime(self.own_s[process], self.node_s),
            clock=lambda: self.now_s,
            **changes,
        )

    def run(self, joules: float, others_s: float = 0.0, **own_s: float) -> None:
        """Ten seconds pass in which processes, and others, use processors, and the package so many joules."""
        self.now_s += 10.0
        self.node_s += others_s + sum(own_s.values())
        for process, seconds in own_s.items():
            self.own_s[process] += seconds
        full = RANGE_UJ + 1
        self.counter.write_text(f"{(int(self.counter.read_text()) + round(joules * 1e6)) % full}\n")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize(
    ("before", "after", "expected_j"),
    [
        (Counter(10.0, 100.0), Counter(30.0, 100.0), 20.0),
        (Counter(90.0, 100.0), Counter(15.0, 100.0), 25.0),  # it was full
        (Counter(90.0), Counter(15.0), 15.0),  # it began again, as after a driver was loaded
        (Counter(20_000.0, 262_143.0), Counter(50.0, 262_143.0), 50.0),  # set to 0: nobody uses 24 kW
    ],
    ids=["grew", "wrapped", "no range", "reset"],
)
def test_a_counter_that_fell_was_full_or_was_reset(before: Counter, after: Counter, expected_j: float) -> None:
    assert gained({"a": before}, {"a": after}, 10.0) == pytest.approx(expected_j)


def test_counters_that_come_or_go_count_for_nothing() -> None:
    assert gained({"a": Counter(5.0), "b": Counter(5.0)}, {"b": Counter(6.0), "c": Counter(900.0)}, 10.0) == 1.0


def test_packages_and_memory_count_once(tmp_path: Path) -> None:
    write_zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    write_zone(tmp_path, "intel-rapl:0:0", "core", 700_000)
    write_zone(tmp_path, "intel-rapl:0:1", "uncore", 100_000)
    write_zone(tmp_path, "intel-rapl:0:2", "dram", 250_000, 65_532_610_987)
    write_zone(tmp_path, "intel-rapl:1", "package-1", 2_000_000)
    write_zone(tmp_path, "intel-rapl:2", "psys", 9_000_000)
    write_zone(tmp_path, "intel-rapl-mmio:0", "package-0", 1_000_000)  # the same package, by another way
    counters = read_rapl(tmp_path)
    assert {name: counter.joules for name, counter in counters.items()} == {
        "intel-rapl:0 package-0": 1.0,
        "intel-rapl:0:2 dram": 0.25,
        "intel-rapl:1 package-1": 2.0,
    }
    assert counters["intel-rapl:0:2 dram"].range_j == pytest.approx(65_532.610987)


def test_what_can_not_be_read_is_left_out(tmp_path: Path) -> None:
    assert read_rapl(tmp_path / "nowhere") == {}
    write_zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000).write_text("")  # as on some virtual machines
    write_zone(tmp_path, "intel-rapl:1", "package-1", 1_000_000, range_uj=None)
    unreadable = write_zone(tmp_path, "intel-rapl:2", "package-2", 1_000_000)
    unreadable.unlink()
    unreadable.mkdir()  # root may read every file, so a mode doesn't help
    assert read_rapl(tmp_path) == {"intel-rapl:1 package-1": Counter(1.0, None)}


def test_workers_of_a_node_share_what_it_uses_by_processor_time(machine: Machine) -> None:
    first, second = machine.meter("first"), machine.meter("second")
    machine.run(400.0, first=8.0, second=4.0, others_s=4.0)
    assert first.read(0.0).cpu_j == pytest.approx(200.0)
    assert second.read(0.0).cpu_j == pytest.approx(100.0)
    machine.run(100.0, first=10.0)
    assert first.read(0.0).cpu_j == pytest.approx(300.0) and second.read(0.0).cpu_j == pytest.approx(100.0)


def test_a_full_counter_costs_nothing(machine: Machine) -> None:
    meter = machine.meter("own")
    for _ in range(40):  # each ten seconds of 1500 W; it is full after 17 of them
        machine.run(15_000.0, own=2.0)
        meter.read(0.0)
    assert meter.read(0.0).cpu_j == pytest.approx(40 * 15_000.0, rel=1e-6)


def test_a_reading_too_soon_changes_nothing(machine: Machine) -> None:
    meter = machine.meter("own")
    assert meter.read(0.0) == EnergyReading()  # nothing known yet is not 0 joules
    machine.run(50.0, own=1.0)
    assert meter.read(0.0) == meter.read(0.0) == EnergyReading(cpu_j=pytest.approx(50.0))


def test_a_counter_that_was_unreadable_for_a_while_loses_nothing(machine: Machine) -> None:
    meter = machine.meter("own")
    text = machine.counter.read_text()
    machine.counter.write_text("")
    assert meter.read(0.0) == EnergyReading()
    machine.counter.write_text(text)
    machine.run(60.0, own=3.0, others_s=3.0)
    assert meter.read(0.0).cpu_j == pytest.approx(30.0)


def test_gpus_are_those_that_the_process_may_see() -> None:
    nvml = FakeNvml([1.0, 20.0, 300.0])
    assert Gpus("2", nvml).read() == {"2": Counter(300.0)}
    assert Gpus("GPU-1, 0", nvml).read() == {"GPU-1": Counter(20.0), "0": Counter(1.0)}
    assert Gpus(None, nvml).read() == Gpus("", nvml).read() == {}  # whose they are isn't known
    assert Gpus("0,7", nvml).read() == {}  # there is no such GPU: part of the truth would look like all of it
    assert Gpus("0", FakeNvml([None])).read() == {}  # older than Volta


def test_a_worker_has_its_gpu_or_its_part_of_one(tmp_path: Path) -> None:
    nvml = FakeNvml([0.0, 1000.0])
    whole, half, none = (EnergyMeter("1", tmp_path, nvml) for _ in range(3))
    assert whole.read(1.0) == half.read(0.5) == none.read(0.0) == EnergyReading()
    nvml.joules[1] = 1600.0
    assert whole.read(1.0).gpu_j == pytest.approx(600.0)
    assert half.read(0.5).gpu_j == pytest.approx(300.0)
    assert none.read(0.0) == EnergyReading()
    nvml.joules[1] = 40.0  # the driver was loaded again
    assert whole.read(1.0).gpu_j == pytest.approx(640.0)
    nvml.joules[1] = None  # the GPU is lost: what is known stays
    assert whole.read(1.0).gpu_j == pytest.approx(640.0)


def test_our_names_are_those_of_the_library() -> None:
    for name in vars(FakeNvml):
        if name.startswith("nvml"):
            assert callable(getattr(pynvml, name))


def test_without_nvml_and_rapl_nothing_is_measured(tmp_path: Path) -> None:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        pass
    else:
        pytest.skip("this machine has NVML")
    meter = EnergyMeter("0", tmp_path)
    assert meter.read(1.0) == meter.read(1.0) == EnergyReading()
    assert not meter.read(1.0).is_measured


def test_every_host_has_a_meter() -> None:
    assert isinstance(Host("builtins:dict", (), None, False).read_energy(0.0), EnergyReading)
