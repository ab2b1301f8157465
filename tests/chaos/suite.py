"""Chaos run: a cluster, a run with faults in it by a schedule, and an undisturbed run to compare it with."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.chaos.checkpoints import (
    broken_promises,
    differing,
    garbage_in,
    promised,
    tensors_of,
)
from tests.chaos.checks import Checks
from tests.chaos.cluster import Cluster, own_cluster
from tests.chaos.faults import Faults
from tests.chaos.invariants import count_faults, end_faults, loss_faults, step_faults
from tests.chaos.job import ENDLESS, KEEP_LAST, disturbed, undisturbed, write_job
from tests.chaos.journal import whole_chain
from tests.chaos.observer import Observer
from tests.chaos.player import Player, RunLost
from tests.chaos.schedule import MOST_WORKERS, Disk, Schedule
from tests.support.disk import ext4_disk, mounted, small_disk
from tests.support.fuse_disk import FuseDisk, fuse_disk
from tests.support.texts import write_texts
from tests.support.worker_processes import title_of

DISK_MB = 96
CPUS = MOST_WORKERS + 2  # a standby, and one that is started while another one ends
ENDS_S = 60.0  # within which nothing is left of a run that has ended
ENDED_S, STEP_S = 180.0, 0.5  # in which an undisturbed run has ended, and more for each step, on a busy machine
LOG_LINES = 40


def run_chaos(schedule: Schedule, checks: Checks, place: Path, patience_s: float) -> None:
    """Play a schedule and check the invariants.

    Args:
        place: an empty directory, for everything that is written.
        patience_s: longest time until the run goes on after a fault.
    """
    for line in str(schedule).splitlines():
        checks.show(line)
    (place / "texts").mkdir()
    write_texts(place / "texts")
    with _disk(schedule.disk, place / "disk") as disk, _stored(disk, place / "stored") as stored:
        with own_cluster(place / "home", CPUS) as cluster:
            _play(schedule, checks, cluster, place, disk, stored, patience_s)
            left = cluster.down()
        checks.check("no process of the cluster is left", left)


def _play(
    schedule: Schedule,
    checks: Checks,
    cluster: Cluster,
    place: Path,
    disk: Path | FuseDisk,
    stored: Path,
    patience_s: float,
) -> None:
    fuse = disk if isinstance(disk, FuseDisk) else None
    disk = fuse.path if fuse else disk
    run = f"chaos-{schedule.seed}"
    job = write_job(place / f"{run}.yaml", place / "texts", disk / "runs", ENDLESS, **disturbed(schedule.workers))
    cluster.expect("submit", str(job))
    run_dir = stored / "runs" / run  # as it is stored: checks meet no faults
    with Observer(run_dir) as observer:
        faults = Faults(cluster, run, disk, observer, fuse)
        player = Player(cluster, run, faults, observer, checks, patience_s, schedule.workers)
        try:
            player.begin()
            player.play(schedule)
            status = player.end(schedule.stops_when_full)
        except RunLost as lost:
            checks.check("the run goes on and ends", [str(lost)])
            _show_logs(checks, run_dir)
            return
        verified = f"{observer.num_verified} checkpoints were verified"
        checks.say(f"step {status['step']}: {status['phase']}; {verified}; {faults.num_missed} faults hit no process")
        checks.check("the observer found nothing wrong", observer.new_faults())
    ended = [] if status["phase"] == "stopped" else [f"{status['phase']}: {status['why']}"]
    checks.check("the run ends as it was asked to", ended)
    checks.check("nothing of the run is left in the cluster", _left_in(cluster, run))
    checks.check(
        "nothing but its records is left in storage",
        garbage_in(run_dir, whole_chain(run_dir).events, faults.num_killed),
    )
    _check_records(checks, cluster, place, run_dir, status)


def _check_records(checks: Checks, cluster: Cluster, place: Path, run_dir: Path, status: dict[str, Any]) -> None:
    steps = status["step"]
    chain = whole_chain(run_dir)
    checks.check("the journal is one chain", chain.faults)
    checks.check("every step is recorded once", step_faults(chain.events) + count_faults(chain.events, steps))
    named = promised(chain.events, KEEP_LAST)
    checks.check("promised checkpoints are good", broken_promises(run_dir, named))
    checks.check("the last step has a checkpoint", end_faults(chain.events, [one.step for one in named]))
    calm = place / "runs" / "calm"
    job = write_job(place / "calm.yaml", place / "texts", calm.parent, named[-1].step + 1, **undisturbed())
    cluster.expect("submit", str(job))
    waited = cluster("wait", "calm", timeout_s=ENDED_S + STEP_S * steps)
    if waited.code != 0:
        checks.check("the undisturbed run succeeds", [f"exit code {waited.code}: {waited.error}"])
        return
    theirs = whole_chain(calm).events
    checks.check("losses are those of an undisturbed run", loss_faults(chain.events, theirs))
    ours, other = tensors_of(named[-1].path(run_dir)), tensors_of(promised(theirs, 1)[0].path(calm))
    checks.check(f"{len(other)} tensors are those of an undisturbed run", differing(ours, other))
    checks.say(f"{steps} steps compared, {len(chain.links)} journal entries, {chain.term} terms")


def _left_in(cluster: Cluster, run: str) -> list[str]:
    """Processes and placement groups that are still there some seconds after a run's end."""
    deadline_s = time.monotonic() + ENDS_S
    left: list[str] = []
    while time.monotonic() < deadline_s:
        left = [title_of(process) for process in cluster.of_run(run)]
        left += [f"a placement group in state {state}" for state in cluster.placement_groups()]
        if not left:
            break
        time.sleep(1.0)
    return left


def _show_logs(checks: Checks, run_dir: Path) -> None:
    """The newest lines of all of the run's logs."""
    for path in sorted(run_dir.glob("logs/*.log")):
        for line in path.read_text(errors="replace").splitlines()[-LOG_LINES:]:
            checks.show(f"    {path.stem}: {line}")


@contextmanager
def _disk(kind: Disk, place: Path) -> Iterator[Path | FuseDisk]:
    make = {Disk.TMPFS: small_disk, Disk.FUSE: fuse_disk}.get(kind, ext4_disk)
    with make(place, DISK_MB) as disk:
        yield disk


@contextmanager
def _stored(disk: Path | FuseDisk, place: Path) -> Iterator[Path]:
    """A directory with what the disk holds, whatever its faults are."""
    if isinstance(disk, FuseDisk):
        yield disk.backing
    else:
        with mounted(disk, place) as stored:
            yield stored
