"""Loss of a model on a text: per token, per byte, and as perplexity; or of its task on rows, with the task's metrics.

Shape legend: R = rows, T = tokens of a row.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import torch

from orchestrator.data.bucket_store import open_store
from orchestrator.data.corpus.sources import read_documents
from orchestrator.data.rows.bucket_rows import open_rows
from orchestrator.data.store import IGNORED_TARGET, Rows
from orchestrator.data.tokenizer import TextTokenizer
from orchestrator.errors import DataError
from orchestrator.inference.rows import rows_of_documents
from orchestrator.model.base import TrainableModel
from orchestrator.model.task import Batch, Loss
from orchestrator.model.tasks.all_tasks import task_of
from orchestrator.protocol.child_process import Evaluation, EvaluationResult, Remark, Split
from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.location import location_of

REMARK_EVERY_S = 5.0


@torch.no_grad()
def evaluate(
    request: Evaluation, job: JobSpec, tokenizer: TextTokenizer | None, model: TrainableModel
) -> Iterator[Remark | EvaluationResult]:
    """Yield remarks on progress, then the result. Attention stays within documents if it did so in training.

    Raises:
        DataError: the text can't be read, has no tokens, or was encoded by another tokenizer.
    """
    if job.has_rows:
        yield _of_rows(request, job, model)
        return
    loss_sum, num_rows, num_tokens, task = 0.0, 0, 0, task_of(job.task, job.data_format)
    sums: dict[str, list[float]] = {name: [0.0, 0.0] for name in task.metrics}
    assert tokenizer is not None
    text = _TextLength(tokenizer)
    reported_s = time.monotonic()
    for rows in _limited(_rows(request, job, tokenizer), request.max_rows):
        found = task.loss(model, _batch(model, rows, job.data.isolate_documents))
        loss_sum += float(found.total)
        _add(sums, found)
        num_rows += len(rows.inputs_RT)
        num_tokens += int((rows.targets_RT != IGNORED_TARGET).sum())
        text.add(rows)
        if time.monotonic() - reported_s > REMARK_EVERY_S:
            yield Remark(f"{num_rows} rows, {num_tokens} tokens: loss {loss_sum / max(num_tokens, 1):.3f} so far")
            reported_s = time.monotonic()
    num_bytes = text.num_bytes()
    if not num_tokens or not num_bytes:
        raise DataError(
            f"{request.corpus or request.split} has no token that could be predicted", remedy="Name a longer text."
        )
    loss = loss_sum / num_tokens
    yield EvaluationResult(
        rows=num_rows,
        units=num_tokens,
        loss=loss,
        num_bytes=num_bytes,
        perplexity=_perplexity(loss),
        bits_per_byte=loss_sum / math.log(2.0) / num_bytes,
        metrics=task.report(_means(sums)),
    )


@torch.no_grad()
def _of_rows(request: Evaluation, job: JobSpec, model: TrainableModel) -> EvaluationResult:
    """The task's loss and metrics on rows of a split."""
    assert request.store_dir is not None
    task, device = task_of(job.task, job.data_format), next(model.parameters()).device
    store = open_rows(location_of(request.store_dir))
    split: Literal["train", "validation"] = "train" if request.split is Split.TRAIN else "validation"
    num_rows = min(store.num_rows(split), request.max_rows or store.num_rows(split))
    if not num_rows:
        raise DataError(f"the {split} split of run {job.name} has no rows", remedy="Name another one: --split.")
    loss_sum, units, at_once = 0.0, 0, max(1, job.train.micro_batch_rows)
    sums: dict[str, list[float]] = {name: [0.0, 0.0] for name in task.metrics}
    for number, start in enumerate(range(0, num_rows, at_once)):
        rows_R = np.arange(start, min(start + at_once, num_rows))
        arrays = task.collate(store.read(split, rows_R), np.random.default_rng((job.train.seed, 0, number)))
        loss = task.loss(model, {name: torch.from_numpy(array).to(device) for name, array in arrays.items()})
        loss_sum, units = loss_sum + float(loss.total), units + int(store.units(split, rows_R).sum())
        _add(sums, loss)
    mean, unit = loss_sum / max(units, 1), job.task.unit
    perplexity = _perplexity(mean) if unit == "tokens" else None
    return EvaluationResult(num_rows, units, mean, unit, perplexity=perplexity, metrics=task.report(_means(sums)))


def _add(sums: dict[str, list[float]], loss: Loss) -> None:
    for name, pair in loss.metrics.items():
        sums[name] = [before + float(each) for before, each in zip(sums[name], pair, strict=True)]


def _means(sums: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: each / weight if weight else 0.0 for name, (each, weight) in sums.items()}


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # exp overflows a float soon after 700


def _rows(request: Evaluation, job: JobSpec, tokenizer: TextTokenizer) -> Iterator[Rows]:
    length, at_once = job.train.sequence_length, max(1, job.train.micro_batch_tokens // job.train.sequence_length)
    if request.corpus is not None:
        documents = read_documents(request.corpus, request.text_key)
        yield from rows_of_documents(documents, tokenizer, length, at_once)
        return
    assert request.store_dir is not None
    split: Literal["train", "validation"] = "train" if request.split is Split.TRAIN else "validation"
    store = open_store(location_of(request.store_dir))
    if store.manifest.tokenizer_digest != tokenizer.digest:
        raise DataError(
            f"the tokens of {store.directory} are those of another tokenizer than {request.run_dir}/tokenizer.json",
            remedy="Name the text itself: --corpus.",
        )
    for start in range(0, num_rows := store.num_rows(split, length), at_once):
        yield store.rows(split, np.arange(start, min(start + at_once, num_rows)), length)


def _limited(batches: Iterator[Rows], max_rows: int | None) -> Iterator[Rows]:
    left = max_rows
    for rows in batches:
        if left is not None and len(rows.inputs_RT) >= left:
            yield Rows(rows.inputs_RT[:left], rows.targets_RT[:left], rows.documents_RT[:left])
            return
        yield rows
        left = None if left is None else left - len(rows.inputs_RT)


def _batch(model: TrainableModel, rows: Rows, isolate_documents: bool) -> Batch:
    arrays = {"inputs": rows.inputs_RT, "targets": rows.targets_RT}
    device = next(model.parameters()).device
    tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    return tensors | ({"documents": torch.from_numpy(rows.documents_RT).to(device)} if isolate_documents else {})


class _TextLength:
    """Counts bytes of the targets' text. It decodes whole documents, as a character may span tokens and rows."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._document: list[int] = []
        self._num_bytes = 0

    def add(self, rows: Rows) -> None:
        for target in rows.targets_RT.reshape(-1).tolist():
            if target != IGNORED_TARGET:
                self._document.append(target)
            else:
                self._close()

    def num_bytes(self) -> int:
        self._close()
        return self._num_bytes

    def _close(self) -> None:
        self._num_bytes += len(self._tokenizer.decode(self._document).encode("utf-8"))
        self._document = []
