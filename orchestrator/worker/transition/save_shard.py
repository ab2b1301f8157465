"""Saving of a rank's part of a checkpoint, in the background: copied from the live shard, then written.

Like a snapshot, it is copied beside the next step's forward and backward passes, which only read the state: the
training thread waits before an update changes it (`ShardSaver.copied`). While a write is under way, all ranks leave out
the steps at which another one is due: no rank waits for storage. Where a guard watches the state between two updates, a
shard is reported only once the guard has found it unchanged after the copy.

A rank saves its sharded state, each element by the one rank that owns it: fp32 masters, both moments, and from rank
0 the buffers. Weights in lower precision are their masters rounded, so they aren't saved. Residuals of error feedback
are saved by each rank for itself: all parts together are what was never sent. Weights that `model.init_from` has are
not saved.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from orchestrator.checkpoint.shard_file import ShardPiece
from orchestrator.checkpoint.shard_image import ShardImage, ShardMemory
from orchestrator.checkpoint.write import write_image
from orchestrator.elastic.expert_change import ExpertSet
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.state_spec import Inventory, Origin, Sharing, saved_shapes
from orchestrator.protocol.worker_report import ShardWritten
from orchestrator.state.ranges import NamedRanges
from orchestrator.state.stream_copies import StreamCopies
from orchestrator.storage.backends.location import Location
from orchestrator.storage.caller import Caller, call_here
from orchestrator.storage.condition import StorageTrouble
from orchestrator.worker.shard.shard import Shard, TrainingProgress
from orchestrator.worker.transition.shard_write import ShardWrite

log = logging.getLogger("orchestrator.worker")

CPU = torch.device("cpu")


class ShardSaver:
    """Writes one shard at a time, again and again while storage refuses it: that is no error of the worker. Nor is it
    one if there is no memory for the copy: then this rank has no part of that checkpoint, which can't be completed.

    Args:
        checkpoints: location of the run's checkpoints.
        tensors: of the state, by the number of experts.
        keeps: state that gradient compression keeps, as in `CompressionSpec.keeps`.
        numerics: as in a worker's report.
        done: called from the saving thread with the written shard.
        refused: called from it with the reason each time that storage refuses the shard.
        failed: called from it with an error of any other kind in writing.
        caller: makes the calls to run storage.
        device: of the shard.
    """

    def __init__(
        self,
        checkpoints: Location,
        tensors: Callable[[int], Inventory],
        keeps: str,
        numerics: str,
        done: Callable[[ShardWritten], None],
        refused: Callable[[StorageTrouble | None], None],
        failed: Callable[[Exception], None],
        caller: Caller = call_here,
        device: torch.device = CPU,
    ) -> None:
        self._caller, self._copies = caller, StreamCopies(device)
        self._tensors, self._keeps, self._numerics = tensors, keeps, numerics
        self._checkpoints, self._done, self._refused, self._failed = checkpoints, done, refused, failed
        self._write: ShardWrite | None = None
        self._newest = (-1, -1)  # step and generation of the newest save
        self._generations: tuple[int, ...] = ()  # the newest two

    @property
    def is_writing(self) -> bool:
        """Whether a write is under way."""
        return self._write is not None and self._write.is_alive()

    @property
    def is_late(self) -> bool:
        """Whether a write is under way that storage has refused once, or that takes long."""
        return self._write is not None and self._write.is_late

    def has_written(self, shard: Shard, progress: TrainingProgress) -> bool:
        """Whether storage has this rank's part of the checkpoint of this step."""
        return self._is_newest(shard, progress) and self._write is not None and self._write.has_written

    def begin(self, generation: int) -> None:
        """Give up a write of a generation before the last one: its checkpoint can't be completed any more."""
        self._generations = (*self._generations[-1:], generation)
        if self._write is not None and self._newest[1] not in self._generations:
            self._write.give_up()

    def save(self, shard: Shard, progress: TrainingProgress) -> None:
        """Copy and write the shard in the background; it must not change until `copied`. An earlier write is given up:
        all ranks save, or none. A repeat for the same step does nothing, unless the state could not be copied.
        """
        if self._is_newest(shard, progress) and self._write is not None and not self._write.lacks_room:
            return
        self.copied()  # of an earlier step, since which no update was applied
        if self._write is not None:
            self._write.give_up()
        self._newest, self._write = (progress.step, shard.world.generation), None
        where = {
            "step": progress.step,
            "term": shard.term,  # of the plan: ranks may learn of a newer controller at different moments
            "generation": shard.world.generation,
            "rank": shard.rank,
        }

        def attempt(image: ShardImage) -> ShardWritten:
            return self._caller(write_image, self._checkpoints, image, **where)

        ranges = shard.engine.ranges().until_update()
        copy = partial(
            self._copy, ranges, self._copies.mark(), shard.rank, shard.groups.placement, shard.experts, progress
        )
        write = ShardWrite(copy, attempt, self._done, self._refused, self._failed, is_verified=shard.seal is None)
        try:
            write.start()
        except RuntimeError as error:
            log.warning("no checkpoint of step %d from this rank: %s", progress.step, error)
        else:
            self._write = write

    def _is_newest(self, shard: Shard, progress: TrainingProgress) -> bool:
        return self._newest == (progress.step, shard.world.generation)

    def _copy(
        self,
        ranges: NamedRanges,
        mark: torch.cuda.Event | None,
        rank: int,
        placement: ExpertPlacement,
        experts: ExpertSet,
        progress: TrainingProgress,
    ) -> ShardMemory:
        tensors = self._tensors(experts.num_experts)
        meta = {
            **asdict(progress),
            "shapes": saved_shapes(tensors),
            "compression": self._keeps,
            **({"numerics": json.loads(self._numerics)} if self._numerics else {}),
            "world_size": placement.world_size,
            "experts": asdict(experts),
        }
        with self._copies.after(mark):
            pieces = pieces_of(ranges, tensors, rank, placement)
            return ShardMemory(pieces, json.dumps(meta, sort_keys=True), rank)

    def copied(self) -> None:
        """Wait until no shard is read any more: then it may change."""
        if self._write is not None:
            self._write.wait_for_copy()

    @property
    def is_unverified(self) -> bool:
        """Whether the newest save is not reported before it is known that the shard didn't change by itself."""
        return self._write is not None and self._write.is_unverified

    def verified(self) -> None:
        """Report the newest save, once it is written: the shard had not changed by itself after it was copied."""
        if self._write is not None:
            self._write.verify()

    def void(self) -> None:
        """Never report the newest save, unless that has happened: the shard has changed by itself."""
        if self._write is not None:
            self._write.give_up()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the write under way. Returns whether it has ended."""
        if self._write is not None:
            self._write.join(timeout_s)
        return self._write is None or not self._write.is_alive()


def pieces_of(ranges: NamedRanges, tensors: Inventory, rank: int, placement: ExpertPlacement) -> list[ShardPiece]:
    """All pieces that this rank saves, in place."""
    held = [tensors[name] for name in ranges.names() if not (tensors[name].is_copy or tensors[name].is_base)]
    cut = [tensor for tensor in held if tensor.sharing is Sharing.SHARDED]
    updated = {tensor.like: [tensor.of_param(*span) for span in ranges.spans(tensor.name)] for tensor in cut}
    pieces = []
    for tensor in held:
        name, spans = tensor.stored, ranges.spans(tensor.name)
        if tensor.sharing is Sharing.PARTIAL:
            name = part_of(name, rank)
        elif tensor.origin is Origin.CONSTANT and tensor.like is not None:
            expert = tensor.like.expert
            first = 0 if expert is None else placement.replica_set(expert, tensor.like.name)[0]
            spans = spans if rank == first else []
        elif tensor.sharing is Sharing.REPLICATED and tensor.like is not None:
            spans = updated.get(
                tensor.like, []
            )  # several ranks hold it: each element is saved by the one that updates it
        elif tensor.sharing is Sharing.REPLICATED and rank > 0:
            continue
        pieces += [_piece(name, start, ranges.view(tensor.name, start, stop)) for start, stop in spans]
    return pieces


def part_of(name: str, rank: int) -> str:
    """Name in a checkpoint of a rank's part of a tensor that is the sum of all ranks' parts."""
    return f"{name}#{rank}"


def _piece(name: str, start: int, data: Tensor) -> ShardPiece:
    # numpy has no bf16; a constant weight comes back from fp32 as it was.
    array = data.detach().to("cpu", torch.float32 if data.dtype is torch.bfloat16 else data.dtype).numpy()
    return ShardPiece(tensor=name, start=start, stop=start + len(array), array=array)
