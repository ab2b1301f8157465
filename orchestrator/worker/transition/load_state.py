"""A checkpoint read back into a rank's shard, whatever world wrote it.

Checkpoints hold the fp32 masters; weights in lower precision are made from them, by the same rounding as after a step.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from orchestrator.checkpoint.read import CheckpointReader
from orchestrator.engine.base import nothing
from orchestrator.errors import CheckpointCorrupt, DataError, NotFound
from orchestrator.protocol.messages import Restore
from orchestrator.state.ranges import NamedRanges
from orchestrator.state.snapshot import PARTIAL
from orchestrator.worker.shard.shard import Progress
from orchestrator.worker.transition.save_shard import part_of

CHUNK = 1 << 22  # elements read at once, so that memory for a copy stays small
PARAM, MASTER, THIN = "param/", "master/", "powersgd/"


@torch.no_grad()
def read_state(
    restore: Restore,
    ranges: NamedRanges,
    sampler: str,
    rank: int,
    world_size: int,
    between: Callable[[], None] = nothing,
) -> Progress:
    """Fill this rank's ranges. What compression keeps stays as it is where the checkpoint has none of it, or it is to
    be reset.

    Args:
        sampler: the order of samples that follows from the job and its data; the checkpoint must have the same, apart
            from stages of a curriculum, which may have been decided while it trained.
        between: called before each piece is read.

    Returns:
        where training stood.

    Raises:
        CheckpointCorrupt: files are missing or changed, or of another model.
        DataError: it was trained on another corpus, or in another order.
    """
    checkpoint = Path(restore.path)
    with CheckpointReader(checkpoint) as reader:
        meta = reader.manifest.meta
        try:
            progress = Progress(int(str(meta["step"])), int(str(meta["num_updates"])), str(meta["sampler"]))
            saved = _without_stages(progress.sampler)
        except (KeyError, ValueError) as error:
            raise CheckpointCorrupt(f"{checkpoint} does not say where training stood: {error!r}") from error
        if saved != _without_stages(sampler):
            raise DataError(
                f"{checkpoint} was trained with the sample order {progress.sampler}; job and data give {sampler}",
                remedy="Resume with the corpus, the batch size, the sequence length and the seed that it began with.",
                unchanged="The checkpoint is as it was.",
            )
        saved_size = 0 if restore.reset_residuals else int(str(meta.get("world_size", 0)))
        for name, held in ranges:
            if name.startswith(PARTIAL):
                _read_parts(reader, name, held.data, range(rank, saved_size, world_size))
                continue
            if name.startswith(THIN) and not saved_size:
                continue
            stored = MASTER + name.removeprefix(PARAM) if name.startswith(PARAM) else name
            for start in range(held.start, held.stop, CHUNK):
                between()
                stop = min(start + CHUNK, held.stop)
                try:
                    values = reader.read(stored, start, stop)
                except (NotFound, ValueError) as error:
                    raise CheckpointCorrupt(
                        f"{checkpoint} is of another model: {error}",
                        remedy="Resume the run that wrote it, with its own job file.",
                    ) from error
                held.data[start - held.start : stop - held.start].copy_(torch.from_numpy(values))
    return progress


def _read_parts(reader: CheckpointReader, name: str, data: torch.Tensor, ranks: range) -> None:
    """The sum of what these ranks had of a tensor. Each rank reads others' parts, so that nothing is lost or double."""
    data.zero_()
    for rank in ranks:
        for start in range(0, data.numel(), CHUNK):
            stop = min(start + CHUNK, data.numel())
            data[start:stop] += torch.from_numpy(reader.read(part_of(name, rank), start, stop)).to(data.device)


def _without_stages(sampler: str) -> object:
    """What decides an order of samples, with a curriculum its stages apart."""
    state = json.loads(sampler)
    return {**state, "stages": None} if isinstance(state, dict) and "num_tokens" in state else state
