"""Loss of a model on a text: per token, per byte, and as perplexity; or of its task on rows, with the task's metrics.
Of a model with exits, on request, with tokens that leave early."""

import math
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from orchestrator.data.store import IGNORED_TARGET
from orchestrator.data.tokenizer import TextTokenizer
from orchestrator.errors import DataError, StorageError
from orchestrator.inference.eval_batches import EVEN, ODD, WHOLE, CountedBatch, row_batches, text_batches
from orchestrator.inference.exit_rule import LAYERS, ExitedTask, KeptRule, ThresholdSearch, exits_of, fitted, save_rule
from orchestrator.model.base import TrainableModel
from orchestrator.model.early_exit import ExitRule
from orchestrator.model.task import Batch, Task
from orchestrator.model.tasks.all_tasks import task_of
from orchestrator.model.tasks.exit_losses import ExitLosses
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.protocol.child_process import Evaluation, EvaluationResult, Remark
from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.location import location_of

REMARK_EVERY_S = 5.0

Batches = Callable[[slice], Iterator[CountedBatch]]  # those of a part of the rows


@torch.no_grad()
def evaluate(
    request: Evaluation,
    job: JobSpec,
    tokenizer: TextTokenizer | None,
    model: TrainableModel,
    rule: ExitRule | None = None,
) -> Iterator[Remark | EvaluationResult]:
    """Yield remarks on progress, then the result.

    Args:
        rule: by which tokens leave at exits, if that is requested.

    Raises:
        DataError: the text can't be read, has no tokens, or was encoded by another tokenizer.
        UsageError: a model without exits is to use them.
        StorageError: a rule for exits can't be kept.
    """
    task: Task = task_of(job.task, job.data_format)
    device = next(model.parameters()).device
    batches: Batches
    if job.has_rows:
        batches = partial(row_batches, request, job, task, device)
    else:
        assert tokenizer is not None
        batches = partial(text_batches, request, job, tokenizer, device)
    if request.early_exit or request.max_loss_increase is not None:
        yield from _with_exits(request, job, task, model, batches, tokenizer, rule)
        return
    task = task if job.model.exits is None else ExitLosses(task, job.model.exits)
    text = None if tokenizer is None or job.has_rows else _TextLength(tokenizer)
    found = yield from _measured(task, model, batches(WHOLE), _unit(job), text)
    yield _result(request, job, task, found, text)


def _with_exits(
    request: Evaluation,
    job: JobSpec,
    task: Task,
    model: TrainableModel,
    batches: Batches,
    tokenizer: TextTokenizer | None,
    known: ExitRule | None,
) -> Iterator[Remark | EvaluationResult]:
    """The loss with exits beside that of all layers. A rule is fitted on one half of the rows, and its loss measured on
    the other one."""
    part, rule, exits, unit = WHOLE, known, exits_of(job), _unit(job)
    if request.max_loss_increase is not None:
        part, rule = ODD, (yield from _found_rule(request, job, task, model, batches))
    assert rule is not None
    # Bytes are those of whole documents, which every other row isn't.
    text = None if tokenizer is None or job.has_rows or part is not WHOLE else _TextLength(tokenizer)
    whole = yield from _measured(task, model, batches(part), unit, text)
    exited = ExitedTask(task, exits, rule)
    found = yield from _measured(exited, model, batches(part), unit)
    result = _result(request, job, exited, found, text)
    mean_layers = result.metrics.pop(LAYERS)
    result = replace(result, mean_layers=mean_layers, loss_of_all_layers=whole.loss)
    if request.max_loss_increase is not None:
        if not math.isfinite(found.loss) or not math.isfinite(whole.loss):
            raise DataError(
                f"the loss on these rows is {found.loss}, and {whole.loss} with all layers",
                remedy="Use another checkpoint: --step.",
                unchanged="No rule was kept.",
            )
        kept = KeptRule(
            rule=rule,
            layers=exits.layers,
            dtype=request.dtype,
            source=request.corpus or request.split.value,
            rows=found.rows,
            max_loss_increase=request.max_loss_increase,
            loss=found.loss,
            loss_of_all_layers=whole.loss,
            mean_layers=mean_layers,
        )
        try:
            place = save_rule(location_of(request.run_dir), location_of(request.checkpoint).name, kept)
        except StorageError:
            yield Remark(f"Measured: loss {found.loss:.4f}, {whole.loss:.4f} with all layers; {mean_layers:.2f} layers")
            raise
        result = replace(result, exit_rule=place)
        if rule.threshold == -torch.inf:
            yield Remark("With this rule no token leaves: any exit costs more loss than is allowed.")
    yield result


def _found_rule(
    request: Evaluation, job: JobSpec, task: Task, model: TrainableModel, batches: Batches
) -> Generator[Remark, None, ExitRule]:
    """The rule with which most tokens leave at no more loss than is allowed, on every other row."""
    exits, most = exits_of(job), request.max_loss_increase
    assert most is not None and isinstance(model, MoELanguageModel)
    if next(batches(ODD), None) is None:
        raise DataError(
            f"{request.corpus or request.split} has too few rows: a rule is fitted on half of them, and needs two rows",
            remedy="Name a longer text, or allow more rows (--max-rows).",
            unchanged="No rule was kept.",
        )
    unit = _unit(job)
    whole = yield from _measured(task, model, batches(EVEN), unit)
    if not whole.units:
        raise _nothing(request)
    yield Remark(
        f"{whole.rows} rows with all layers: loss {whole.loss:.4f}. The rule is fitted to their hidden states."
    )
    rule, estimates = fitted(model, lambda: (counted.batch for counted in batches(EVEN)))
    search = ThresholdSearch(estimates)
    while not search.is_over:
        tried = replace(rule, threshold=search.threshold)
        found = yield from _measured(ExitedTask(task, exits, tried), model, batches(EVEN), unit)
        search.narrow(found.loss <= whole.loss * (1.0 + most))
        yield Remark(f"{found.means()[LAYERS]:.2f} layers: {found.loss / whole.loss - 1.0:+.2%} loss")
    return replace(rule, threshold=search.threshold)


@dataclass
class _Measured:
    """Sums over rows."""

    loss_sum: float = 0.0
    rows: int = 0
    units: int = 0
    sums: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """Mean over the units."""
        return self.loss_sum / max(self.units, 1)

    def means(self) -> dict[str, float]:
        """Those of metrics."""
        return {name: each / weight if weight else 0.0 for name, (each, weight) in self.sums.items()}


def _measured(
    task: Task,
    model: TrainableModel,
    batches: Iterator[CountedBatch],
    unit: str,
    text: "_TextLength | None" = None,
) -> Generator[Remark, None, _Measured]:
    """Yield remarks on progress; returns what was measured."""
    found = _Measured(sums=dict.fromkeys(task.metrics, (0.0, 0.0)))
    reported_s = time.monotonic()
    for counted in batches:
        loss = task.loss(model, counted.batch)
        found.loss_sum += float(loss.total)
        for name, (each, weight) in loss.metrics.items():
            before = found.sums[name]
            found.sums[name] = before[0] + float(each), before[1] + float(weight)
        found.rows, found.units = found.rows + counted.num_rows, found.units + counted.num_units
        if text is not None:
            text.add(counted.batch)
        if time.monotonic() - reported_s > REMARK_EVERY_S:
            yield Remark(f"{found.rows} rows, {found.units} {unit}: loss {found.loss:.3f} so far")
            reported_s = time.monotonic()
    return found


def _unit(job: JobSpec) -> str:
    """What the loss is a mean over, in the plural: of a text target tokens, whatever the task is."""
    return job.task.unit if job.has_rows else "tokens"


def _result(
    request: Evaluation, job: JobSpec, task: Task, found: _Measured, text: "_TextLength | None"
) -> EvaluationResult:
    """Raises DataError if a text has no target."""
    unit, num_bytes = _unit(job), None if text is None else text.num_bytes()
    if num_bytes == 0 or (not found.units and not job.has_rows):
        raise _nothing(request)
    return EvaluationResult(
        found.rows,
        found.units,
        found.loss,
        unit,
        num_bytes=num_bytes,
        perplexity=math.exp(min(found.loss, 700.0)) if unit == "tokens" else None,  # exp overflows soon after 700
        bits_per_byte=None if num_bytes is None else found.loss_sum / math.log(2.0) / num_bytes,
        metrics=task.report(found.means()),
    )


def _nothing(request: Evaluation) -> DataError:
    return DataError(
        f"{request.corpus or request.split} has no token that could be predicted", remedy="Name a longer text."
    )


class _TextLength:
    """Counts bytes of the targets' text. It decodes whole documents, as a character may span tokens and rows."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._document: list[int] = []
        self._num_bytes = 0

    def add(self, batch: Batch) -> None:
        for target in batch["targets"].reshape(-1).tolist():
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
