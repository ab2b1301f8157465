"""What a checkpoint costs training, until when it is safe, and how fast it is read at another world size.

    python -m benchmarks.checkpoint [--quick] [--directory DIR | s3 | ceph]

Two ranks (gloo, one thread each) train one model of more than 15 M parameters. In turns a checkpoint is written at the
beginning of some steps, in each of these ways, or none:

- `ours`: as a worker does it: copied beside the next step, written and read back by another process,
- `deepspeed`: `save_checkpoint` of the same engine,
- `dcp_async`: `torch.distributed.checkpoint.async_save` of the tensors that ours has,
- `torch_save`: `torch.save` of the same, a file per rank.

`stall_s` is for how long the training thread does nothing else, `step_ratio` the mean step of such a turn over that of
a turn without a checkpoint, `minute_ratio` what follows for a minute with one checkpoint, `durable_s` the time until
all bytes are on the device: where a way doesn't flush its files, a thread does so as soon as they are written. Figures
are the slowest rank's.

`read_ratio` is the time in which our checkpoint is read and verified, as each rank of a world of three reads it, one
after the other, over that of reading and digesting the same bytes; both in one thread, with files that aren't in the
page cache. To restore a run, ranks verify as they read; a user's `resume` verifies all of it before (`read_s` of
`verify`).

With `--directory s3` or `ceph` the checkpoint is written to a server with S3 on this machine, moto or Ceph's gateway,
which takes its processor time from the ranks. Only `ours` is measured then, as the other ways write files.
"""

import gc
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import (
    Interval,
    Result,
    Spread,
    alternate,
    at_least,
    at_most,
    median_interval,
    ratios,
    run,
    say,
)
from benchmarks.support.checkpoint_arms import Turn, turns_of_arms
from benchmarks.support.environment import environment, worker_environment
from orchestrator.checkpoint.read import CheckpointReader
from orchestrator.checkpoint.stored_bytes import ObjectBytes
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.inventory import inventory
from orchestrator.elastic.state_layout import training_layout
from orchestrator.elastic.world import World
from orchestrator.model.factory import catalogue
from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.location import Location, location_of, objects_at
from tests.support.buckets import ceph_bucket, s3_in_process
from tests.support.ranks import Ranks

RANKS, READERS = 2, 3
VOCAB = 4096
MODEL: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 768,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
}
QUICK_MODEL = MODEL | {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "moe_intermediate_size": 32}
TRAIN = {"global_batch_size": 8, "micro_batch_size": 4, "sequence_length": 128}
ROUNDS, QUICK_ROUNDS = 12, 1
STEPS, QUICK_STEPS = 8, 2  # of a turn
READS, QUICK_READS = 24, 1
TIMEOUT_S = 3600.0
FILE_READ_BYTES = 2**20  # at once, by the plain reader
OTHERS = ("deepspeed", "dcp_async", "torch_save")
LEAST_RATIOS = {"deepspeed": 10.0, "dcp_async": 1.0}  # of their stall to ours
SERVERS = {"s3": s3_in_process, "ceph": ceph_bucket}  # by `--directory`


def measure(quick: bool, directory: str) -> Result:
    job = JobSpec.model_validate({"name": "checkpoint", "model": QUICK_MODEL if quick else MODEL, "train": TRAIN})
    rounds, steps = (QUICK_ROUNDS, QUICK_STEPS) if quick else (ROUNDS, STEPS)
    others = () if directory in SERVERS else OTHERS
    with _storage(directory) as storage:
        turns = _turns(job, storage, ("none", "ours", *others), rounds, steps)
        (name,) = objects_at(storage).names("ours")
        written = storage / "ours" / name
        gc.collect()
        gc.freeze()  # as a worker does before it reads
        readers: dict[str, Callable[[], float]] = {
            "ours": lambda: _read(job, written),
            "plain": lambda: _read_plainly(written),
            "verify": lambda: _verify(written),
        }
        for read in readers.values():
            read()  # whatever a first call takes longer for
        reads = alternate(readers, QUICK_READS if quick else READS)
    read_ratio = median_interval(ratios(reads["ours"], reads["plain"]))
    stalls = {arm: [turn.stall_s for turn in turns[arm]] for arm in turns}
    over = {arm: median_interval(ratios(stalls[arm], stalls["ours"])) for arm in others}
    none = [turn.step_s for turn in turns["none"]]
    step_ratio = {a: median_interval(ratios([t.step_s for t in turns[a]], none)) for a in ("ours", *others)}
    extra_s = [steps * (ours.step_s - other_s) for ours, other_s in zip(turns["ours"], none, strict=True)]
    minute_ratio = median_interval([1.0 + extra / 60.0 for extra in extra_s])
    durable = median_interval([turn.durable_s for turn in turns["ours"]])
    _show(turns, step_ratio, read_ratio)
    return Result(
        name="checkpoint",
        seed=0,
        settings={
            "quick": quick,
            "directory": directory,
            "ranks": RANKS,
            "readers": READERS,
            "parameters": _num_parameters(job),
            "model": QUICK_MODEL if quick else MODEL,
            "train": TRAIN,
            "steps": steps,
        },
        rounds=rounds,
        metrics={
            "stall_s": {arm: Spread.of(values) for arm, values in stalls.items() if arm != "none"},
            "stall_over_ours": over,
            "step_s": {arm: Spread.of([turn.step_s for turn in turns[arm]]) for arm in turns},
            "step_ratio": step_ratio,
            "minute_ratio": minute_ratio,
            "durable_s": {arm: Spread.of([t.durable_s for t in turns[arm]]) for arm in ("ours", *others)},
            "num_bytes": {arm: turns[arm][-1].num_bytes for arm in ("ours", *others)},
            "read_s": {arm: Spread.of(values) for arm, values in reads.items()},
            "read_ratio": read_ratio,
        },
        baselines=dict.fromkeys(others, "benchmarks.support.checkpoint_arms"),
        bars=(
            *(
                at_least(f"stall {arm} over ours", LEAST_RATIOS[arm], over[arm])
                for arm in others
                if arm in LEAST_RATIOS
            ),
            at_most("minute_ratio", 1.03, minute_ratio),
            at_most("durable_s", 30.0, durable),
            at_most("read_ratio", 2.0, read_ratio),
        ),
    )


@contextmanager
def _storage(directory: str) -> Iterator[Location]:
    if directory in SERVERS:
        with SERVERS[directory]() as url:
            yield location_of(f"{url}/checkpoints")
    else:
        with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=directory or None) as folder:
            yield Path(folder)


def _turns(job: JobSpec, storage: Location, arms: Sequence[str], rounds: int, steps: int) -> dict[str, list[Turn]]:
    """Of the slowest rank each."""
    with environment(worker_environment(1, keep_memory=True)):
        ranks = Ranks()
        try:
            found = ranks.run(turns_of_arms, RANKS, job, VOCAB, storage, arms, rounds, steps, timeout_s=TIMEOUT_S)
        finally:
            ranks.close()
    return {
        arm: [
            Turn(
                stall_s=max(turn.stall_s for turn in of_ranks),
                step_s=max(turn.step_s for turn in of_ranks),
                durable_s=max(turn.durable_s for turn in of_ranks),
                num_bytes=of_ranks[0].num_bytes,
            )
            for of_ranks in zip(*(rank[arm] for rank in found), strict=True)
        ]
        for arm in found[0]
    }


def _read(job: JobSpec, checkpoint: Location) -> float:
    """Seconds to read what each rank of a world of another size holds."""
    params, buffers = catalogue(job.model, VOCAB)
    tensors = inventory(params, job, buffers)
    world = World(0, tuple(f"w{number}" for number in range(READERS)))
    placement = ExpertPlacement.balanced(job.model.n_routed_experts, READERS)
    layout = training_layout(tensors, placement, world, job.communication)
    ranges = [layout.ranges_of(worker).tolist() for worker in world.members]
    shards = [[np.ones(stop - start, np.float32) for _, start, stop in held] for held in ranges]  # as an engine's is
    _forget(checkpoint)
    began = time.perf_counter()
    for held, memory in zip(ranges, shards, strict=True):
        wanted = [(tensors[layout.names[number]].stored, start, stop) for number, start, stop in held]
        with CheckpointReader(checkpoint) as reader:
            for index, start, values in reader.read_all(wanted):
                begin = start - held[index][1]
                memory[index][begin : begin + len(values)] = values
    return time.perf_counter() - began


def _verify(checkpoint: Location) -> float:
    """Seconds to verify all of it."""
    _forget(checkpoint)
    began = time.perf_counter()
    with CheckpointReader(checkpoint) as reader:
        reader.verify()
    return time.perf_counter() - began


def _read_plainly(checkpoint: Location) -> float:
    """Seconds to read and digest the same files."""
    _forget(checkpoint)
    began = time.perf_counter()
    if isinstance(checkpoint, Path):
        buffer = bytearray(FILE_READ_BYTES)
        for path in checkpoint.iterdir():
            digest = hashlib.sha256()
            with path.open("rb", buffering=0) as file:
                while size := file.readinto(buffer):
                    digest.update(memoryview(buffer)[:size])
    else:
        objects = objects_at(checkpoint)
        for found in objects.objects(""):
            digest = hashlib.sha256()
            for start in range(0, found.num_bytes, ObjectBytes.read_bytes):
                digest.update(objects.get(found.key, start, start + ObjectBytes.read_bytes))
    return time.perf_counter() - began


def _forget(checkpoint: Location) -> None:
    """Drop its files from the page cache."""
    for path in checkpoint.iterdir() if isinstance(checkpoint, Path) else ():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _num_parameters(job: JobSpec) -> int:
    params, _ = catalogue(job.model, VOCAB)
    return sum(param.numel for param in params)


def _show(turns: dict[str, list[Turn]], step_ratio: dict[str, Interval], read_ratio: Interval) -> None:
    say(f"{'':12}{'stall ms':>10}{'step ms':>10}{'step ratio':>24}{'durable s':>11}{'MB':>8}")
    for arm, of_arm in turns.items():
        stall, step, durable = (
            Spread.of([getattr(turn, name) for turn in of_arm]).median for name in ("stall_s", "step_s", "durable_s")
        )
        line = f"{arm:12}{1e3 * stall:10.1f}{1e3 * step:10.1f}"
        if arm in step_ratio:
            ratio = step_ratio[arm]
            line += f"{f'{ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]':>24}"
            line += f"{durable:11.2f}{of_arm[-1].num_bytes / 1e6:8.1f}"
        say(line)
    say(f"read by {READERS} ranks, verified, over read and digested: {read_ratio.median:.2f}")


if __name__ == "__main__":
    run(__doc__, measure, {"directory": ""})
