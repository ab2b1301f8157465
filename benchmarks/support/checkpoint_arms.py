"""Checkpoints of one engine in two or more ranks, written in different ways, and steps beside them.

Each way saves what this rank's part of our checkpoint has: masters, both moments, and from rank 0 the buffers.
DeepSpeed's own method decides itself: it saves these, and the weights of rank 0.
"""

import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch._C._distributed_c10d import Store

from benchmarks.harness import alternate
from orchestrator.checkpoint.manifest import manifest_of
from orchestrator.checkpoint.shard_file import read_shards
from orchestrator.checkpoint.write import commit
from orchestrator.elastic.expert_change import ExpertSet
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.inventory import inventory
from orchestrator.elastic.state_spec import Inventory, saved_shapes
from orchestrator.elastic.world import World
from orchestrator.engine.base import noop
from orchestrator.engine.deepspeed.engine import DeepSpeedEngineAdapter
from orchestrator.engine.process_groups import connect
from orchestrator.model.factory import build_model, catalogue
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.protocol.worker_report import ShardWritten
from orchestrator.spec.job import JobSpec
from orchestrator.storage.atomic import flush
from orchestrator.storage.backends.location import Location, objects_at
from orchestrator.storage.storage_process import StorageProcess
from orchestrator.worker.shard.shard import TrainingProgress
from orchestrator.worker.transition.save_shard import ShardSaver, pieces_of

TERM, GENERATION = 1, 0
PATIENCE_S = 300.0


@dataclass(frozen=True)
class Turn:
    """A checkpoint, or none, and the steps after it.

    Args:
        stall_s: for which the training thread did nothing else.
        step_s: mean of all steps, the stall included.
        durable_s: until the checkpoint is on the device.
        num_bytes: of these.
    """

    stall_s: float
    step_s: float
    durable_s: float = 0.0
    num_bytes: int = 0


@dataclass
class Saving:
    """A checkpoint on its way.

    Args:
        copied: waits until the state may change.
        complete: called once the files of all ranks are on the device; collective over them.
    """

    copied: Callable[[], None] = noop
    complete: Callable[[], None] = noop
    durable: threading.Event = field(default_factory=threading.Event)
    durable_time: float = 0.0

    def done(self) -> None:
        self.durable_time = time.perf_counter()
        self.durable.set()


class Method(Protocol):
    """A way to save. `begin` returns when training may go on; collective over the ranks."""

    def begin(self, place: Location) -> Saving: ...


class Ours:
    """As a worker does it: another process writes, and reads back. Rank 0 adds the manifest."""

    def __init__(self, shard: Any, tensors: Inventory) -> None:
        self.shard, self._tensors, self._process = shard, tensors, StorageProcess("checkpoint benchmark")
        self._written: list[ShardWritten] = []
        self._step = 0

    def begin(self, place: Location) -> Saving:
        saving = Saving()

        def done(written: ShardWritten) -> None:
            self._written = [written]
            saving.done()

        def failed(error: object) -> None:
            raise RuntimeError(f"the checkpoint failed: {error}")

        saver = ShardSaver(place, lambda _: self._tensors, "", "", done, failed, failed, self._process.call)
        self._step += 1
        saver.save(self.shard, TrainingProgress(self._step, self._step, "{}"))
        saving.copied, saving.complete = saver.copied, lambda: self._complete(place)
        return saving

    def _complete(self, place: Location) -> None:
        written: list[Any] = [None] * len(self.shard.world.members)
        dist.all_gather_object(written, self._written[0])
        if self.shard.rank == 0:
            shards = read_shards(place, written, term=TERM)
            commit(place, manifest_of(shards, run_id="benchmark", term=TERM, shapes=saved_shapes(self._tensors)))
        dist.barrier()


class DeepSpeeds:
    """`DeepSpeedEngine.save_checkpoint`, as it is configured by default."""

    def __init__(self, engine: DeepSpeedEngineAdapter) -> None:
        self._core = engine._core

    def begin(self, place: Location) -> Saving:
        directory = _directory(place)
        self._core.has_moe_layers, known = False, self._core.has_moe_layers  # it can save only its own layers
        self._core.save_checkpoint(str(directory), tag="step")
        self._core.has_moe_layers = known
        return _flushed(directory)


class Dcp:
    """`torch.distributed.checkpoint.async_save`, with a group of its own: its thread meets the other ranks' threads."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self._state, self._group = state, dist.new_group()

    def begin(self, place: Location) -> Saving:
        saving = Saving()
        future = dcp.async_save(self._state, checkpoint_id=str(_directory(place)), process_group=self._group)
        future.add_done_callback(lambda _: saving.done())  # type: ignore[union-attr]  # it flushes its files itself
        return saving


class TorchSave:
    """`torch.save`, a file per rank."""

    def __init__(self, state: dict[str, torch.Tensor], rank: int) -> None:
        self._state, self._rank = state, rank

    def begin(self, place: Location) -> Saving:
        directory = _directory(place)
        directory.mkdir(parents=True, exist_ok=True)
        torch.save(self._state, directory / f"{self._rank}.pt")
        return _flushed(directory)


def _directory(place: Location) -> Path:
    assert isinstance(place, Path), "only ours writes to buckets"
    return place


def _flushed(directory: Path) -> Saving:
    """What is there already, flushed by a thread at once."""
    saving = Saving()

    def flush_all() -> None:
        for path in [*directory.rglob("*"), directory]:
            flush(path)
        saving.done()

    threading.Thread(target=flush_all, daemon=True).start()
    return saving


class Trainee:
    """One rank's engine, with what is saved of it."""

    def __init__(self, rank: int, world_size: int, store: Store, prefix: str, job: JobSpec, vocab_size: int) -> None:
        placement = ExpertPlacement.balanced(job.model.n_routed_experts, world_size)
        groups = connect(store, prefix, rank, placement, "gloo")
        model = build_model(job.model, vocab_size, ExpertParallelContext(placement, rank, groups.exchange))
        self.engine = DeepSpeedEngineAdapter(model, job.train, groups, torch.device("cpu"), job.communication)
        model.init_weights(0)
        self.engine.on_weights_initialized()
        params, buffers = catalogue(job.model, vocab_size)
        self.tensors = inventory(params, job, buffers)
        world = World(GENERATION, tuple(f"w{number}" for number in range(world_size)))
        parts = {"groups": groups, "engine": self.engine, "seal": None, "experts": ExpertSet(placement.num_experts)}
        self.shard = SimpleNamespace(term=TERM, world=world, rank=rank, **parts)
        self.rank, self._job, self._vocab_size = rank, job, vocab_size
        self._generator = torch.Generator().manual_seed(rank)

    def step(self, before_update: Callable[[], None] = noop) -> None:
        train = self._job.train
        rows = train.global_batch_size // len(self.shard.world.members)
        shape = (rows, train.sequence_length + 1)
        tokens = torch.randint(0, self._vocab_size, shape, generator=self._generator)
        batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
        self.engine.accumulate(batch, train.global_batch_size * train.sequence_length, last=True)
        self.engine.step(1e-4, before_update)

    def pieces(self) -> dict[str, torch.Tensor]:
        """This rank's part of a checkpoint; names differ between ranks."""
        pieces = pieces_of(self.engine.ranges(), self.tensors, self.rank, self.shard.groups.placement)
        return {piece.key: torch.from_numpy(piece.array) for piece in pieces}


def turns_of_arms(
    rank: int,
    world_size: int,
    store: Store,
    prefix: str,
    job: JobSpec,
    vocab_size: int,
    storage: Location,
    arms: Sequence[str],
    rounds: int,
    steps: int,
) -> dict[str, list[Turn]]:
    """Turns by arm, of which `none` writes no checkpoint. The last one of ours stays in `storage`."""
    trainee = Trainee(rank, world_size, store, prefix, job, vocab_size)
    methods: dict[str, Callable[[], Method | None]] = {
        "none": lambda: None,
        "ours": lambda: Ours(trainee.shard, trainee.tensors),
        "deepspeed": lambda: DeepSpeeds(trainee.engine),
        "dcp_async": lambda: Dcp(trainee.pieces()),
        "torch_save": lambda: TorchSave(trainee.pieces(), rank),
    }

    def turn(name: str, method: Method | None) -> Turn:
        place = storage / name
        if rank == 0:
            _discard(place)
        os.sync()
        dist.barrier()
        return _turn(trainee, method, place, steps)

    turns = {name: partial(turn, name, methods[name]()) for name in arms}
    alternate(turns, 1)  # warms up
    return alternate(turns, rounds)


def _discard(place: Location) -> None:
    if isinstance(place, Path):
        shutil.rmtree(place, ignore_errors=True)
    else:
        objects = objects_at(place)
        objects.delete([found.key for found in objects.objects("")])


def _turn(trainee: Trainee, method: Method | None, place: Location, steps: int) -> Turn:
    waited_s = 0.0
    began = time.perf_counter()
    saving = method.begin(place) if method is not None else Saving()
    stall_s = time.perf_counter() - began

    def before_update() -> None:
        nonlocal waited_s
        since = time.perf_counter()
        saving.copied()
        waited_s = time.perf_counter() - since

    for number in range(steps):
        trainee.step(before_update if number == 0 else noop)
    dist.barrier()
    step_s = (time.perf_counter() - began) / steps
    if method is None:
        return Turn(0.0, step_s)
    if not saving.durable.wait(PATIENCE_S):
        raise TimeoutError(f"no checkpoint in {place} within {PATIENCE_S:.0f} s")
    dist.barrier()
    completed = time.perf_counter()
    saving.complete()
    durable_s = saving.durable_time - began + time.perf_counter() - completed
    num_bytes = sum(found.num_bytes for found in objects_at(place).objects(""))
    return Turn(stall_s + waited_s, step_s, durable_s, num_bytes)
