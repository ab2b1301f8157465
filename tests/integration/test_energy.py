"""Energy of living processes is journalled, and the last reading of a dead one is kept. Real Ray, made-up counters."""

from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import ray

from orchestrator.cluster.actors import Host
from orchestrator.cluster.inbox import Inbox
from orchestrator.cluster.remote import Remote
from orchestrator.cluster.storage_thread import StorageThread
from orchestrator.controller.monitors import EnergyWatch
from orchestrator.policy.state.config import RunLimits
from orchestrator.run_records.journaled_run import JournaledRun
from orchestrator.run_records.run_history import user_events
from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.location import objects_at
from orchestrator.storage.journal import read_events
from orchestrator.telemetry.energy import EnergyMeter, ProcessorTime
from tests.support.powercap import write_zone

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


class Metered(Host):
    """A host whose process uses a quarter of its node's processor time, and a reading later as much again."""

    def __init__(self, root: str) -> None:
        super().__init__("builtins:dict", (), None, False)
        self._readings = 0
        self._energy = EnergyMeter(root=Path(root), processor_time=self._time)

    def _time(self) -> ProcessorTime:
        self._readings += 1
        return ProcessorTime(1.0 * self._readings, 4.0 * self._readings)


def energy_in(run_dir: Path) -> list[dict[str, Any]]:
    return [event["workers"] for event in read_events(objects_at(run_dir)) if event["kind"] == "energy"]


def answers(inbox: Inbox, count: int) -> None:
    for _ in range(count):
        inbox.get(timeout=60.0).take()


def test_what_workers_have_used_is_journalled_and_survives_them(tmp_path: Path) -> None:
    run_dir, root = tmp_path / "run", tmp_path / "powercap"
    run_dir.mkdir()
    counter = write_zone(root, "intel-rapl:0", "package-0", 0)
    limits = RunLimits.of("run", JobSpec.model_validate({"schema": "v1", "name": "run"}))
    memory = JournaledRun(run_dir, limits)
    inbox: Inbox = SimpleQueue()
    storage = StorageThread(SimpleQueue())
    watch = EnergyWatch(0.0, memory, storage, inbox)
    handles: dict[str, Remote[Any]] = {name: Remote(ray.remote(Metered).remote(str(root))) for name in ("w0", "w1")}
    ray.get([handle.send(Metered.pid) for handle in handles.values()])  # from now on they count

    counter.write_text("4000000\n")
    watch.poll(0.0, handles)
    answers(inbox, 2)
    watch.poll(9.0, handles)  # too soon to ask again, or to write
    assert inbox.empty() and energy_in(run_dir) == []
    watch.poll(31.0, handles)
    storage.finish()
    answers(inbox, 2)
    storage.finish()
    one = {"gpu_j": None, "cpu_j": 1.0}
    assert energy_in(run_dir) == [{"w0": one, "w1": one}]
    assert user_events(run_dir) == []  # bookkeeping

    handles.pop("w1").kill()
    counter.write_text("12000000\n")
    watch.close(handles)
    storage.finish()
    w0_j = energy_in(run_dir)[-1]["w0"]["cpu_j"]
    assert w0_j == pytest.approx(3.0) and energy_in(run_dir)[-1]["w1"] == one
    handles["w0"].kill()


def test_where_nothing_can_be_measured_nothing_is_written_or_waited_for(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    limits = RunLimits.of("run", JobSpec.model_validate({"schema": "v1", "name": "run"}))
    memory = JournaledRun(run_dir, limits)
    inbox: Inbox = SimpleQueue()
    storage = StorageThread(SimpleQueue())
    watch = EnergyWatch(0.0, memory, storage, inbox)
    handles: dict[str, Remote[Any]] = {"w0": Remote(ray.remote(Metered).remote(str(tmp_path / "nowhere")))}
    for now_s in (0.0, 40.0, 80.0):
        watch.poll(now_s, handles)
        answers(inbox, 1)
    watch.close(handles)
    storage.finish()
    assert read_events(objects_at(run_dir)) == []
    handles["w0"].kill()
