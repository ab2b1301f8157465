"""A small checkpoint, as two ranks write it and a controller completes it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from orchestrator.checkpoint.manifest import manifest_of
from orchestrator.checkpoint.shard_file import ShardPiece, read_shards
from orchestrator.checkpoint.shard_image import ShardMemory
from orchestrator.checkpoint.write import commit, write_image
from orchestrator.elastic.state_spec import MASTER
from orchestrator.protocol.events.base import plain_of
from orchestrator.protocol.events.training import CheckpointCommitted
from orchestrator.protocol.worker_report import ShardWritten
from orchestrator.storage.backends.bucket_url import BucketUrl
from orchestrator.storage.backends.location import Location, objects_at
from orchestrator.storage.journal import Journal

Place = TypeVar("Place", Path, BucketUrl)

VALUES = np.arange(10, dtype=np.float32)


def write_checkpoint(run_dir: Place, step: int = 20, generation: int = 0, journal: Journal | None = None) -> Place:
    """Write `master/a`, which are the `VALUES`, in two pieces, and `buffer/b`.

    Args:
        journal: of the run; None for one that takes the next term.
    """
    directory = run_dir / "checkpoints"
    pieces = [
        [ShardPiece("master/a", 0, 6, VALUES[:6])],
        [ShardPiece("master/a", 6, 10, VALUES[6:]), ShardPiece("buffer/b", 0, 2, np.array([1, 2], np.int64))],
    ]
    shards = [
        write_shard(directory, mine, step=step, term=1, generation=generation, rank=rank)
        for rank, mine in enumerate(pieces)
    ]
    shapes, dtypes = {"master/a": (2, 5), "buffer/b": (2,)}, {"buffer/b": "int64"}
    manifest = manifest_of(read_shards(directory, shards, term=1), run_id="r", term=1, shapes=shapes, dtypes=dtypes)
    path = commit(directory, manifest)
    complete = CheckpointCommitted(step, str(path), generation, manifest.digest)
    (journal or Journal(objects_at(run_dir))).append([plain_of(complete)])
    return path


def write_weights(checkpoints: Path, weights: Mapping[str, npt.NDArray[np.float32]]) -> Path:
    """A checkpoint of masters alone, by the model's names."""
    pieces = [ShardPiece(f"{MASTER}/{name}", 0, array.size, array.reshape(-1)) for name, array in weights.items()]
    shard = write_shard(checkpoints, pieces, step=0, term=1, generation=0, rank=0)
    shapes = {f"{MASTER}/{name}": array.shape for name, array in weights.items()}
    return commit(
        checkpoints, manifest_of(read_shards(checkpoints, [shard], term=1), run_id="r", term=1, shapes=shapes)
    )


def write_shard(
    checkpoints: Location,
    pieces: Sequence[ShardPiece],
    *,
    step: int,
    term: int,
    generation: int,
    rank: int,
    meta: str = "{}",
) -> ShardWritten:
    """Write one rank's part of a checkpoint. Arguments and errors are those of `ShardMemory` and `write_image`."""
    with ShardMemory(pieces, meta, rank) as memory:
        return write_image(checkpoints, memory.image, step=step, term=term, generation=generation, rank=rank)
