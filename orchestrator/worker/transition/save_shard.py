"""Saving of a rank's part of a checkpoint: copied at once, written in the background.

A rank saves its sharded state, each element by the one rank that owns it: fp32 masters, both moments, and from rank
0 the buffers. Weights in lower precision are their masters rounded, so they aren't saved. Residuals of error feedback
are saved by each rank for itself: all parts together are what was never sent.
"""

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from orchestrator.checkpoint.write import ShardPiece, write_shard
from orchestrator.protocol.worker_report import ShardWritten
from orchestrator.state.ranges import NamedRanges
from orchestrator.state.snapshot import PARTIAL
from orchestrator.worker.shard.shard import Shard, TrainingProgress

MOMENT = "exp_avg/"


class ShardSaver:
    """Writes one shard at a time.

    Args:
        checkpoints: the run's directory of checkpoints.
        shapes: of every tensor in a checkpoint, for its readers.
        keeps: state that gradient compression keeps, as in `CompressionSpec.keeps`.
        numerics: as in a worker's report.
        done: called from the writing thread with the written shard.
        failed: called from it with the error.
    """

    def __init__(
        self,
        checkpoints: Path,
        shapes: Mapping[str, tuple[int, ...]],
        keeps: str,
        numerics: str,
        done: Callable[[ShardWritten], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._shapes, self._keeps, self._numerics = shapes, keeps, numerics
        self._checkpoints, self._done, self._failed = checkpoints, done, failed
        self._thread: threading.Thread | None = None

    def save(self, shard: Shard, progress: TrainingProgress) -> None:
        """Copy the shard now and write it in the background. Waits for a write that is still under way."""
        self.wait()
        pieces = pieces_of(shard.engine.ranges(), shard.rank)
        self._thread = threading.Thread(
            target=self._write, args=(pieces, shard, progress), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, pieces: list[ShardPiece], shard: Shard, progress: TrainingProgress) -> None:
        try:
            written = write_shard(
                self._checkpoints,
                pieces,
                step=progress.step,
                term=shard.term,  # of the plan: ranks may learn of a newer controller at different moments
                generation=shard.world.generation,
                rank=shard.rank,
                meta=json.dumps(
                    {
                        **asdict(progress),
                        "shapes": self._shapes,
                        "compression": self._keeps,
                        **({"numerics": json.loads(self._numerics)} if self._numerics else {}),
                        "world_size": shard.world.size,
                    },
                    sort_keys=True,
                ),
            )
        except Exception as error:  # of any kind: the end of the run waits for every shard
            self._failed(error)
        else:
            self._done(written)


def pieces_of(ranges: NamedRanges, rank: int) -> list[ShardPiece]:
    """Copies of all pieces that this rank saves."""
    pieces = []
    for name, held in ranges:
        kind = name.partition("/")[0]
        if kind in ("master", "exp_avg", "exp_avg_sq") or (rank == 0 and kind in ("buffer", "powersgd")):
            pieces.append(_piece(name, held.start, held.data))
        elif name.startswith(PARTIAL):
            pieces.append(_piece(part_of(name, rank), held.start, held.data))
    if any(name.startswith("master/") for name in ranges.names()):
        return pieces
    # In fp32 the weights are their own masters; a rank saves those elements whose moments it owns.
    for name in ranges.names():
        if name.startswith(MOMENT):
            param = name.removeprefix(MOMENT)
            for start, stop in ranges.spans(name):
                pieces.append(_piece(f"master/{param}", start, ranges.view(f"param/{param}", start, stop)))
    return pieces


def part_of(name: str, rank: int) -> str:
    """Name in a checkpoint of a rank's part of a tensor that is the sum of all ranks' parts."""
    return f"{name}#{rank}"


def _piece(name: str, start: int, data: Tensor) -> ShardPiece:
    copy = data.detach().cpu().numpy().copy()
    return ShardPiece(tensor=name, start=start, stop=start + len(copy), array=copy)
