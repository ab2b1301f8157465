"""What run storage that hangs costs: the pace of training meanwhile, and that of a recovery.

    python -m benchmarks.storage_hangs [--quick] [--kind fuse]

A run with 2 workers, the model of `benchmarks.rescale`, on a local cluster. Its storage is an ext4 file system in a
file, which is frozen: calls that write to it don't return, and can't be interrupted. By FUSE those that read don't
either. Needs root, and a loop device or FUSE.

- `pace`: steps per second of 5 minutes with storage that hangs over those of the minutes before and after.
- `hung_over_well`: stall of a recovery from a killed worker with storage that hangs over that with storage that is
  well, in turn. `stall_s` is as in `benchmarks.recovery`: from right before the kill to the end of the first step that
  had never been voted for, less the median step of the new world.
"""

import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from benchmarks.harness import Result, at_least, at_most, equals, median_interval, median_ratio_interval, run, say
from benchmarks.rescale import BATCH, MODEL, NEVER, QUICK_MODEL
from benchmarks.support.data import data_spec, prepared, stores_dir
from benchmarks.support.losses import full, typical_step_s
from benchmarks.support.product import PATIENCE_S, LiveRun, Product
from orchestrator.policy.state.progress import STALL_STEPS
from orchestrator.protocol.step_record import StepRecord
from orchestrator.spec.data import DataSpec
from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.location import objects_at
from orchestrator.storage.journal import read_events
from tests.support.hanging_disk import HangingDisk, hanging_disk

WORKERS = 2
DISK_MB = 2000
FILE_SYSTEMS = {"ext4": "ext4, frozen", "fuse": "tmpfs by FUSE, all calls hang"}
HANG_S, QUICK_HANG_S = 300.0, 20.0
ROUNDS = 10  # kills in each condition of storage


@dataclass(frozen=True)
class Hang:
    """What a run did while its storage hung."""

    pace: float
    before_steps_per_s: float
    hung_steps_per_s: float
    after_steps_per_s: float
    workers_lost: int


@dataclass(frozen=True)
class Kill:
    stall_s: float
    step_s: float
    steps_replayed: int


def measure(quick: bool, kind: str) -> Result:
    hang_s, rounds = (QUICK_HANG_S, 1) if quick else (HANG_S, ROUNDS)
    with tempfile.TemporaryDirectory(prefix="storage-hangs-") as folder:
        workspace = Path(folder)
        data, stores = data_spec(quick, workspace), stores_dir(quick, workspace)
        prepared(data, stores)
        with (
            hanging_disk(kind, workspace / "disk", DISK_MB) as disk,
            Product(workspace / "home", num_cpus=WORKERS + 2) as product,
        ):
            (disk.path / ".data").symlink_to(stores)
            live = LiveRun(product.client, job_of(data, disk.path, quick))
            hang = hang_of(live, disk, hang_s)
            say(f"hung for {hang_s:g} s: {hang}")
            kills = kills_of(live, disk, rounds)
            live.stop()
            published = Counter(
                r["step"] for e in read_events(objects_at(live.run_dir)) if e["kind"] == "steps" for r in e["records"]
            )
    return result_of(quick, kind, hang_s, rounds, hang, kills, published)


def job_of(data: DataSpec, storage: Path, quick: bool) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "hangs",
            "workers": {"min": 1, "max": WORKERS, "initial": WORKERS},
            "model": QUICK_MODEL if quick else MODEL,
            "train": {**BATCH, "max_steps": NEVER, "lr": 3e-4, "lr_scheduler": {"kind": "constant"}},
            "data": data,
            "storage": str(storage),
        }
    )


def hang_of(live: LiveRun, disk: HangingDisk, hang_s: float) -> Hang:
    """Train for half of `hang_s`, then with storage that hangs, then for half of it again."""
    full(live, WORKERS)
    times = [time.time()]
    time.sleep(hang_s / 2)
    times.append(time.time())
    with disk.hanging():
        time.sleep(hang_s)
        times.append(time.time())
    time.sleep(hang_s / 2)
    times.append(time.time())
    votes = votes_of(live, live.members()[0])
    rates = [
        sum(begin <= vote.timing.vote_time < end for vote in votes) / (end - begin) for begin, end in pairwise(times)
    ]
    pace = rates[1] / ((rates[0] + rates[2]) / 2)
    return Hang(pace, *rates, workers_lost=len(live.status().recoveries))


def kills_of(live: LiveRun, disk: HangingDisk, rounds: int) -> dict[str, list[Kill]]:
    """Kill a worker with storage well and hung, in turn: A B B A."""
    chance, found = random.Random(0), dict[str, list[Kill]](well=[], hung=[])
    for number in range(rounds):
        for condition in list(found)[:: 1 if number % 2 == 0 else -1]:
            full(live, WORKERS)
            survivor, victim = live.members()[:2]
            target = live.pids()[f"worker/{victim}"]  # of all processes, and the tracker doesn't answer without storage
            with disk.hanging() if condition == "hung" else nullcontext():
                kill = kill_one(live, survivor, target, chance)
            found[condition].append(kill)
            say(f"round {number + 1}, storage {condition}: {kill}")
    return found


def kill_one(live: LiveRun, survivor: str, target: int, chance: random.Random) -> Kill:
    """Kill the worker of this process within a step, and wait until the survivor has done some steps."""
    time.sleep(chance.random() * typical_step_s(live, survivor))
    newest, fault_time = votes_of(live, survivor)[-1], time.time()
    os.kill(target, signal.SIGKILL)
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        votes = votes_of(live, survivor)
        new = [vote for vote in votes if vote.generation > newest.generation]
        if len(new) >= 2 * STALL_STEPS:
            break
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"no step {PATIENCE_S:g} s after the process {target} of a worker was killed")
        time.sleep(0.2)
    known = max(vote.step for vote in votes if vote.generation == newest.generation)
    step_s = median(vote.timing.step_s for vote in new)
    first = next(vote for vote in new if vote.step > known)
    return Kill(first.timing.vote_time - fault_time - step_s, step_s, known + 1 - new[0].step)


def votes_of(live: LiveRun, worker: str) -> Sequence[StepRecord]:
    return live.report_of(worker, after_step=-1).history.records


def result_of(
    quick: bool,
    kind: str,
    hang_s: float,
    rounds: int,
    hang: Hang,
    kills: dict[str, list[Kill]],
    published: Counter[int],
) -> Result:
    stalls = {condition: [kill.stall_s for kill in some] for condition, some in kills.items()}
    ratio = median_ratio_interval({"kill": stalls["hung"]}, {"kill": stalls["well"]})
    once = len(published) == max(published) + 1 and set(published.values()) == {1}
    return Result(
        name="storage_hangs",
        seed=0,
        settings={"quick": quick, "hang_s": hang_s, "workers": WORKERS, "file_system": FILE_SYSTEMS[kind]},
        rounds=rounds,
        metrics={
            "hang": asdict(hang),
            "stall_well_s": median_interval(stalls["well"]),
            "stall_hung_s": median_interval(stalls["hung"]),
            "hung_over_well": ratio,
            "steps_replayed": max(kill.steps_replayed for some in kills.values() for kill in some),
        },
        bars=(
            equals("workers_lost_by_the_hang", 0, hang.workers_lost),
            at_least("pace", 0.95, hang.pace),
            at_most("hung_over_well", 1.1, ratio),
            equals("every_step_published_once", True, once),
        ),
    )


if __name__ == "__main__":
    run(__doc__, measure, {"kind": "ext4"})
