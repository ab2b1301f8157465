"""A teacher's predictions for a block of rows, written into files that hold those of all rows.

`orchestrator.submission.teaching` starts this by name on the nodes of a cluster.
"""

import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from orchestrator.data.logit_store import PARTS, LogitOptions, file_of
from orchestrator.data.manifest import Split
from orchestrator.data.store import TokenStore
from orchestrator.errors import DataError
from orchestrator.model.base import TrainableModel
from orchestrator.model.tasks.distillation import top_k_distribution
from orchestrator.spec.distill import DistillSpec
from orchestrator.spec.train import TrainSpec
from orchestrator.worker.whole_models.whole_model import teacher_model

TOKENS_AT_ONCE = 2048


@dataclass(frozen=True)
class TeachBlock:
    """Rows [start, stop) of a split.

    Args:
        store, teacher, to: directories.
        options_json: `LogitOptions`.
    """

    store: str
    teacher: str
    to: str
    options_json: str
    split: Split
    start: int
    stop: int


def teach_block(task: str) -> str:
    """Write the predictions of a `TeachBlock`, given as JSON. Returns the number of its rows.

    Raises:
        DataError: the store has changed meanwhile.
        UsageError, CheckpointCorrupt: so has the teacher.
    """
    block = TeachBlock(**json.loads(task))
    options = LogitOptions.model_validate_json(block.options_json)
    store, model = _opened(block.store, block.teacher, options)
    at_once = max(1, TOKENS_AT_ONCE // options.sequence_length)
    for start in range(block.start, block.stop, at_once):
        rows_R = np.arange(start, min(start + at_once, block.stop))
        for part, array in zip(PARTS, _predicted(store, model, options, block.split, rows_R), strict=True):
            _write(Path(block.to) / file_of(block.split, part), options.stored(part, array), start)
    return str(block.stop - block.start)


@lru_cache(maxsize=1)  # a process has many blocks of one store
def _opened(store_dir: str, teacher: str, options: LogitOptions) -> tuple[TokenStore, TrainableModel]:
    store = TokenStore.open(store_dir)
    if store.digest != options.store:
        raise DataError(f"{store_dir} has changed since this began", remedy="Start again.")
    distill = DistillSpec(teacher=teacher, teacher_sha256=options.teacher_sha256)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return store, teacher_model(distill, options.vocab_size, TrainSpec(), device)


@torch.no_grad()
def _predicted(
    store: TokenStore, model: TrainableModel, options: LogitOptions, split: Split, rows_R: NDArray[np.int64]
) -> tuple[NDArray[np.generic], ...]:
    """Tokens, their log-probabilities, and that of all others."""
    rows, device = store.rows(split, rows_R, options.sequence_length), next(model.parameters()).device
    documents = torch.from_numpy(rows.documents_RT).to(device) if options.isolate_documents else None
    scores = model.scores(torch.from_numpy(rows.inputs_RT).to(device), documents)
    found = top_k_distribution(scores, options.top_k, options.temperature)
    return tuple(
        each.reshape(options.shape(part, len(rows_R))).cpu().numpy() for part, each in zip(PARTS, found, strict=True)
    )


def _write(path: Path, rows: NDArray[np.generic], first: int) -> None:
    """Write rows of a file that other processes write to elsewhere."""
    file = os.open(path, os.O_WRONLY)
    try:
        rest, place = memoryview(np.ascontiguousarray(rows).tobytes()), first * rows[0].nbytes
        while rest:  # a disk that is almost full takes a part
            written = os.pwrite(file, rest, place)
            rest, place = rest[written:], place + written
        os.fsync(file)
    finally:
        os.close(file)
