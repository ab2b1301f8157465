"""Micro-batches of what a model is evaluated on: a split of a run's text or rows, or another text.

Shape legend: R = rows, T = tokens of a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from orchestrator.data.bucket_store import open_store
from orchestrator.data.corpus.sources import read_documents
from orchestrator.data.rows.bucket_rows import open_rows
from orchestrator.data.store import IGNORED_TARGET, Rows
from orchestrator.data.tokenizer import TextTokenizer
from orchestrator.errors import DataError
from orchestrator.inference.rows import rows_of_documents
from orchestrator.model.task import Batch, Task
from orchestrator.protocol.child_process import Evaluation, Split
from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.location import location_of

WHOLE, EVEN, ODD = slice(None), slice(0, None, 2), slice(1, None, 2)  # rows by number

TOKENS_AT_ONCE = 4096  # at least, as there are no gradients


@dataclass(frozen=True)
class CountedBatch:
    """A micro-batch, its number of rows, and of the units over which a loss is a mean."""

    batch: Batch
    num_rows: int
    num_units: int


def text_batches(
    request: Evaluation, job: JobSpec, tokenizer: TextTokenizer, device: torch.device, part: slice = WHOLE
) -> Iterator[CountedBatch]:
    """Rows of a text. Attention stays within documents if it did so in training.

    Args:
        part: of the first `request.max_rows` rows.

    Raises:
        DataError: the text can't be read, or was encoded by another tokenizer.
    """
    before = 0
    for rows in _limited(_rows(request, job, tokenizer), request.max_rows):
        chosen_R = _chosen(before, len(rows.inputs_RT), part)
        before += len(rows.inputs_RT)
        if not len(chosen_R):
            continue
        arrays: dict[str, NDArray[np.generic]] = {
            "inputs": rows.inputs_RT[chosen_R],
            "targets": rows.targets_RT[chosen_R],
        }
        if job.data.isolate_documents:
            arrays["documents"] = rows.documents_RT[chosen_R]
        num_targets = int((arrays["targets"] != IGNORED_TARGET).sum())
        yield CountedBatch(_on(device, arrays), len(chosen_R), num_targets)


def row_batches(
    request: Evaluation, job: JobSpec, task: Task, device: torch.device, part: slice = WHOLE
) -> Iterator[CountedBatch]:
    """Rows of a task that aren't of one text. Arguments as of `text_batches`.

    Raises:
        DataError: the split has none.
    """
    assert request.store_dir is not None
    store = open_rows(location_of(request.store_dir))
    split = _split(request)
    num_rows = min(store.num_rows(split), request.max_rows or store.num_rows(split))
    if not num_rows:
        raise DataError(f"the {split} split of run {job.name} has no rows", remedy="Name another one: --split.")
    at_once = max(1, job.train.micro_batch_rows)
    rows_R = np.arange(num_rows)[part]
    for number, start in enumerate(range(0, len(rows_R), at_once)):
        some_R = rows_R[start : start + at_once]
        arrays = task.collate(store.read(split, some_R), np.random.default_rng((job.train.seed, 0, number)))
        yield CountedBatch(_on(device, dict(arrays)), len(some_R), int(store.units(split, some_R).sum()))


def _rows(request: Evaluation, job: JobSpec, tokenizer: TextTokenizer) -> Iterator[Rows]:
    length, tokens = job.train.sequence_length, job.train.micro_batch_tokens
    # With expert_choice a token's experts depend on those beside it, a user's task may compare rows, and other models
    # hold all logits.
    if not job.has_own_code and job.model.router.selection != "expert_choice":
        tokens = max(tokens, TOKENS_AT_ONCE)
    at_once = max(1, tokens // length)
    if request.corpus is not None:
        documents = read_documents(request.corpus, request.text_key)
        yield from rows_of_documents(documents, tokenizer, length, at_once)
        return
    assert request.store_dir is not None
    split = _split(request)
    store = open_store(location_of(request.store_dir))
    if store.manifest.tokenizer_digest != tokenizer.digest:
        raise DataError(
            f"the tokens of {store.directory} are those of another tokenizer than {request.run_dir}/tokenizer.json",
            remedy="Name the text itself: --corpus.",
        )
    for start in range(0, num_rows := store.num_rows(split, length), at_once):
        yield store.rows(split, np.arange(start, min(start + at_once, num_rows)), length)


def _split(request: Evaluation) -> Literal["train", "validation"]:
    return "train" if request.split is Split.TRAIN else "validation"


def _limited(batches: Iterator[Rows], max_rows: int | None) -> Iterator[Rows]:
    left = max_rows
    for rows in batches:
        if left is not None and len(rows.inputs_RT) >= left:
            yield Rows(rows.inputs_RT[:left], rows.targets_RT[:left], rows.documents_RT[:left])
            return
        yield rows
        left = None if left is None else left - len(rows.inputs_RT)


def _chosen(first: int, count: int, part: slice) -> NDArray[np.int64]:
    """Indices of those of `count` rows, numbered from `first` on, that belong to a part of all rows."""
    numbers_R = np.arange(first, first + count)
    return np.flatnonzero(numbers_R % (part.step or 1) == (part.start or 0))


def _on(device: torch.device, arrays: dict[str, NDArray[np.generic]]) -> Batch:
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
