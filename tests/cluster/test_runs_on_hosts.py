"""Runs as users have them, with a worker on each of three hosts."""

import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from orchestrator.client import OrchestratorClient
from orchestrator.policy.health.hangs import SILENT_WHEN_STOPPING_S
from orchestrator.protocol.status import RunPhase, RunStatus
from orchestrator.run_records.run_files import RunFiles
from orchestrator.run_records.run_history import read_steps
from orchestrator.spec.communication import CommunicationSpec
from orchestrator.spec.fault_tolerance import ProtectionSpec, RecoverySpec
from orchestrator.spec.job import JobSpec
from orchestrator.spec.workers import WorkersSpec
from orchestrator.storage.backends.location import objects_at
from orchestrator.storage.journal import read_events
from orchestrator.worker.shard.compression_tuner import PROBES, SKIPPED
from tests.support.driver import Driver
from tests.support.hosts import Hosts, until
from tests.support.texts import small_job

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(300),
    pytest.mark.skipif(Hosts.available() is not None, reason=str(Hosts.available())),
]

SOON_S = 15.0  # gloo's operations that are not interrupted take a minute


@pytest.fixture
def hosts(request: pytest.FixtureRequest) -> Iterator[Hosts]:
    """Three, with room for one worker on each, or for as many as a test asks for."""
    with Hosts(3) as hosts:
        hosts.start_ray(cpus=getattr(request, "param", 1))
        yield hosts


@pytest.fixture
def driver(hosts: Hosts) -> Iterator[Driver]:
    with Driver(hosts, 0) as driver:
        yield driver


def _job(name: str, texts: Path, tmp_path: Path, size: int = 3) -> JobSpec:
    workers = WorkersSpec(min=1, max=size, initial=size)
    plain = small_job(texts, max_steps=100_000)
    return plain.model_copy(update={"name": name, "workers": workers, "storage": str(tmp_path / "runs")})


def _until(driver: Driver, run: str, condition: Callable[[RunStatus], bool], patience_s: float = 120.0) -> RunStatus:
    deadline_s = time.monotonic() + patience_s
    while True:
        status: RunStatus = driver.call(OrchestratorClient.get, run)
        if condition(status):
            return status
        assert time.monotonic() < deadline_s and not status.phase.ended, status
        time.sleep(0.05)


def _trained_a_little(driver: Driver, job: JobSpec) -> str:
    run = str(driver.call(OrchestratorClient.submit, job))
    _until(driver, run, lambda s: s.step > 20)
    return run


def _stop(driver: Driver, run: str) -> RunStatus:
    """End the run; it must end well and account for every sample."""
    driver.call(OrchestratorClient.stop, run)
    ended: RunStatus = driver.call(OrchestratorClient.wait, run)
    assert ended.phase is RunPhase.STOPPED and ended.checkpoint_step == ended.step - 1
    account = driver.call(OrchestratorClient.audit, run)
    assert account.ok and account.steps == ended.step
    until(lambda: list(driver.call(places)) == ["scheduler"], 10.0, "the end of all that belonged to the run")
    return ended


def places(client: OrchestratorClient) -> dict[str, tuple[str, int]]:
    """Address of its host and process id there, of every living actor that has a name. In a driver."""
    actors = ray._private.state.actors().values()
    living = [actor for actor in actors if actor["Name"] and actor["State"] == "ALIVE"]
    return {actor["Name"]: (actor["Address"]["IPAddress"], actor["Pid"]) for actor in living}


def _sockets(hosts: Hosts, index: int, pid: int, *options: str) -> list[tuple[str, str]]:
    """(here, there) of sockets that a process on a host has made for IPv4, as gloo and streams do, and Ray does not."""
    lines = hosts.run(index, ["ss", "-Hntp4", *options]).splitlines()
    fields = [line.split() for line in lines if f"pid={pid}," in line]
    return [(here, there) for _, _, _, here, there, *_ in fields if not here.startswith("[")]


def test_workers_on_three_hosts_train_over_the_network(
    hosts: Hosts, driver: Driver, texts: Path, tmp_path: Path
) -> None:
    run = _trained_a_little(driver, _job("apart", texts, tmp_path))
    found = driver.call(places)
    steering = {"scheduler", *(f"{run}/{name}" for name in ("controller", "rendezvous", "tracker"))}
    workers = [place for name, place in found.items() if name not in steering]
    assert {found[name][0] for name in steering} == {hosts.addresses[0]}
    assert sorted(address for address, _ in workers) == list(hosts.addresses)

    placed = [(hosts.addresses.index(address), pid) for address, pid in workers]
    listening = {here for index, pid in placed for here, _ in _sockets(hosts, index, pid, "--listening")}
    assert {place.partition(":")[0] for place in listening} == set(hosts.addresses)
    for index, pid in placed:
        others = {address for address in hosts.addresses if address != hosts.addresses[index]}
        connected = _sockets(hosts, index, pid)
        gloo = [(here, there) for here, there in connected if {here, there} & listening]
        streams = [pair for pair in connected if pair not in gloo]
        # Two groups, to either peer; streams from the rank that it protects and to its buddy.
        for pairs, number in ((gloo, 4), (streams, 2)):
            assert {here.partition(":")[0] for here, _ in pairs} == {hosts.addresses[index]}
            assert {there.partition(":")[0] for _, there in pairs} == others and len(pairs) == number
    ended = _stop(driver, run)
    assert ended.loss is not None and ended.first_loss is not None and ended.loss < ended.first_loss


OVERHEAD = 200_000  # bytes per second and host: Ray, the rendezvous store, reports


def test_the_ledger_agrees_with_the_interfaces(hosts: Hosts, driver: Driver, texts: Path, tmp_path: Path) -> None:
    job = _job("counted", texts, tmp_path)
    larger = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "moe_intermediate_size": 128}
    model = job.model.model_copy(update=larger)
    run = _trained_a_little(driver, job.model_copy(update={"model": model}))
    first, began = _sent_by_hosts(hosts), time.time()
    status = _until(driver, run, lambda s: True)
    _until(driver, run, lambda s: s.step > status.step + 100)
    last, ended = _sent_by_hosts(hosts), time.time()
    _stop(driver, run)
    records = [r for r in RunFiles(Path(status.run_dir)).steps() if began < r.timing.vote_time <= ended]
    kinds = {kind for record in records for kind in record.communication.traffic}
    assert kinds == {"gradient", "parameter", "dispatch", "combine", "protection", "control"}
    counted = sum(traffic.sent for record in records for traffic in record.communication.traffic.values())
    measured, overhead = last - first, OVERHEAD * len(hosts.addresses) * (ended - began)
    one_step = 2 * counted / len(records)  # that was under way at either end
    assert counted - one_step < measured < 1.05 * counted + overhead + one_step
    assert counted > 5 * overhead  # else this would show nothing


def _sent_by_hosts(hosts: Hosts) -> int:
    """Bytes that the interfaces of all hosts have sent."""
    total = 0
    for index in range(len(hosts.addresses)):
        lines = hosts.run(index, ["cat", "/proc/net/dev"]).splitlines()
        (counters,) = [line.partition(":")[2].split() for line in lines if line.strip().startswith("eth0:")]
        total += int(counters[8])
    return total


def _events(driver: Driver, run: str) -> list[dict[str, Any]]:
    status: RunStatus = driver.call(OrchestratorClient.get, run)
    return read_events(objects_at(Path(status.run_dir)))


def _fullest(hosts: Hosts, driver: Driver) -> tuple[int, tuple[str, ...]]:
    """The host with the most workers, but not the head, and those workers."""
    workers: dict[int, list[str]] = {index: [] for index in range(3)}
    for name, (address, _) in driver.call(places).items():
        if "/worker/" in name:
            workers[hosts.addresses.index(address)].append(name.rpartition("/")[2])
    index = max((1, 2), key=lambda index: len(workers[index]))
    return index, tuple(sorted(workers[index]))


def _goes_on_without(driver: Driver, run: str, workers: tuple[str, ...], lost_time: float) -> None:
    """At once, with those that are left, and with what they hold in memory."""
    status = _until(driver, run, lambda s: bool(s.recoveries) and s.step > s.recoveries[0].step + 20)
    (recovery,) = status.recoveries
    assert recovery.lost == workers
    assert status.workers_now == recovery.to_size == recovery.from_size - len(workers)
    assert recovery.steps_lost == 0 and recovery.source == "memory" and recovery.state_identical
    steps = {record.step: record for record in RunFiles(Path(status.run_dir)).steps()}
    idle_s = steps[recovery.step + 1].timing.vote_time - lost_time
    print(f"the next step's vote came {idle_s:.2f} s after the loss of a host; {recovery.why}")
    assert idle_s < SOON_S


@pytest.mark.parametrize("is_cut", [False, True], ids=["its connections are closed", "nobody is told"])
def test_a_host_that_dies_costs_no_committed_step(
    hosts: Hosts, driver: Driver, texts: Path, tmp_path: Path, is_cut: bool
) -> None:
    """The kernel closes the connections of killed processes, but not when the power fails."""
    run = _trained_a_little(driver, _job("mortal", texts, tmp_path))
    index, workers = _fullest(hosts, driver)
    lost_time = time.time()
    if is_cut:
        hosts.cut(index)
    hosts.kill_host(index)
    _goes_on_without(driver, run, workers, lost_time)
    if not is_cut:  # broken connections show which worker is lost, not its silence
        times = {event["kind"]: event["time"] for event in _events(driver, run)}
        assert times["worker_lost"] - times["generation_aborted"] < SILENT_WHEN_STOPPING_S
    _stop(driver, run)


def test_a_host_that_is_drained_is_left_before_its_deadline(
    hosts: Hosts, driver: Driver, texts: Path, tmp_path: Path
) -> None:
    """No step is lost or done twice; while no other node is free the run continues smaller, and no worker is placed
    there."""
    run = _trained_a_little(driver, _job("drained", texts, tmp_path))
    index, (worker,) = _fullest(hosts, driver)
    deadline = hosts.drain(index, 10.0)

    def left() -> bool:
        found = driver.call(places)
        return all(address != hosts.addresses[index] for name, (address, _) in found.items() if name.startswith(run))

    until(left, deadline - time.time(), f"{worker} to leave")
    print(f"off the host {10.0 - (deadline - time.time()):.2f} s after the notice")
    hosts.kill_host(index)
    left_at = driver.call(OrchestratorClient.get, run).step
    status = _until(driver, run, lambda s: s.step > left_at + 50)
    (rescale,) = status.rescales
    assert rescale.why == f"{worker} must leave: its node is drained" and rescale.state_identical
    assert (rescale.from_size, rescale.to_size, rescale.steps_lost) == (3, 2, 0) and not status.recoveries
    assert status.workers_now == 2
    assert "no place yet" in status.why or "there is room for 2" in status.why  # by then it may be granted no more

    spare = hosts.add()
    hosts.join(spare)
    whole = _until(driver, run, lambda s: s.workers_now == 3 and s.rescales[-1].stall_s is not None)
    assert whole.rescales[-1].state_identical
    _stop(driver, run)


@pytest.mark.parametrize("hosts", [2], indirect=True, ids=["two workers a host"])
def test_buddies_live_on_different_hosts(hosts: Hosts, driver: Driver, texts: Path, tmp_path: Path) -> None:
    """Else two lost with their host would take the only copies of a shard along."""
    run = _trained_a_little(driver, _job("crowded", texts, tmp_path, size=5))
    index, workers = _fullest(hosts, driver)
    assert len(workers) == 2
    lost_time = time.time()
    hosts.cut(index)
    _goes_on_without(driver, run, workers, lost_time)
    _stop(driver, run)


def test_a_host_that_was_cut_off_is_removed_and_used_again_later(
    hosts: Hosts, driver: Driver, texts: Path, tmp_path: Path
) -> None:
    run = _trained_a_little(driver, _job("parted", texts, tmp_path))
    index, (worker,) = _fullest(hosts, driver)
    lost_time = time.time()
    hosts.cut(index)
    _goes_on_without(driver, run, (worker,), lost_time)
    hosts.mend(index)
    whole = _until(driver, run, lambda s: s.workers_now == 3 and s.rescales[-1].stall_s is not None)
    assert whole.rescales[-1].steps_lost == 0 and whole.rescales[-1].state_identical
    workers = {name: place[0] for name, place in driver.call(places).items() if "/worker/" in name}
    assert hosts.addresses[index] in workers.values() and f"{run}/worker/{worker}" not in workers
    _stop(driver, run)


def test_a_host_where_a_worker_failed_gets_no_new_one(
    hosts: Hosts, driver: Driver, texts: Path, tmp_path: Path
) -> None:
    """There is room for a worker on each host; after one failure the only free place is not used."""
    plain = _job("wary", texts, tmp_path)
    run = _trained_a_little(driver, plain.model_copy(update={"recovery": RecoverySpec(quarantine_after=1)}))
    workers = [place for name, place in driver.call(places).items() if "/worker/" in name]
    pid = next(pid for address, pid in workers if address == hosts.addresses[1])
    hosts.run(1, ["kill", "-KILL", str(pid)])
    status = _until(driver, run, lambda s: bool(s.recoveries) and "no place yet" in s.why)
    assert (status.workers_now, status.workers_wanted) == (2, 3)
    (event,) = [event for event in _events(driver, run) if event["kind"] == "node_quarantined"]
    _until(driver, run, lambda s: s.step > status.step + 100)
    status = _until(driver, run, lambda s: True)
    assert (status.workers_now, event["failures"]) == (2, 1) and "no place yet" in status.why
    _stop(driver, run)


def test_a_worker_that_was_cut_off_comes_back_ends_and_has_written_nothing(
    hosts: Hosts, driver: Driver, texts: Path, tmp_path: Path
) -> None:
    """Its generation is over when it can be reached again: what it then holds or does may not show anywhere."""
    plain = _job("fenced", texts, tmp_path)
    checkpoint = plain.checkpoint.model_copy(update={"every": 2, "keep_last": None})
    run = _trained_a_little(driver, plain.model_copy(update={"checkpoint": checkpoint}))
    index, (worker,) = _fullest(hosts, driver)
    (outcast,) = [process for process in hosts.processes(index) if process.name().startswith("ray::worker")]
    lost_time = time.time()
    hosts.cut(index)
    _goes_on_without(driver, run, (worker,), lost_time)
    assert outcast.is_running()  # and believes that it trains
    hosts.mend(index)
    psutil.wait_procs([outcast], timeout=SOON_S)
    assert not outcast.is_running()
    status = _until(driver, run, lambda s: s.workers_now == 3 and s.recoveries[0].stall_s is not None)

    (recovery,) = status.recoveries
    (over_time,) = [event["time"] for event in _events(driver, run) if event["kind"] == "generation_aborted"]
    checkpoints = Path(status.run_dir) / "checkpoints"
    complete = RunFiles(Path(status.run_dir)).checkpoints()
    for shard in [path for path in checkpoints.glob("*/*") if path.parent.name not in {c.name for c in complete}]:
        generation = int(shard.parent.name.rpartition("-")[2])
        assert generation >= recovery.generation or shard.stat().st_mtime < over_time, shard
    assert complete[-1].step > recovery.step
    assert all((c.step > recovery.step) == (c.generation >= recovery.generation) for c in complete)
    published = [record for event in _events(driver, run) if event["kind"] == "steps" for record in event["records"]]
    assert all((r["step"] > recovery.step) == (r["generation"] >= recovery.generation) for r in published)
    assert len(published) == len({r["step"] for r in published})
    _stop(driver, run)
    metrics = sqlite3.connect(tmp_path / "runs" / "mlflow.db")
    assert metrics.execute("SELECT count(*) FROM metrics WHERE key = 'train/loss'").fetchone()[0] > recovery.step
    twice = "SELECT key, step FROM metrics WHERE key NOT LIKE 'system/%' GROUP BY key, step HAVING count(*) > 1"
    assert metrics.execute(twice).fetchall() == []


def test_auto_compresses_on_a_slow_link(hosts: Hosts, driver: Driver, texts: Path, tmp_path: Path) -> None:
    communication = CommunicationSpec.model_validate({"compression": "auto", "bucket_mb": 0.05})
    job = _job("slow", texts, tmp_path).model_copy(
        update={"communication": communication, "protection": ProtectionSpec(every="none")}
    )
    for index in range(3):
        hosts.limit(index, 10.0)
    run = str(driver.call(OrchestratorClient.submit, job))
    _until(driver, run, lambda s: s.step > SKIPPED + PROBES + 2)
    ended = _stop(driver, run)
    schemes = [record.communication.compression for record in read_steps(Path(ended.run_dir))]
    assert schemes[: SKIPPED + PROBES] == ["none"] * (SKIPPED + PROBES)
    assert set(schemes[SKIPPED + PROBES :]) == {"int4"}
