"""A user's own task: `task: {entrypoint: "package.module:function"}`.

    def function(options: dict) -> Task

What it returns has `loss(model, batch)`, and may have `collate(rows, rng)`, `metrics`, `report(means)` and
`needs_reference` (`orchestrator.model.task.Task`). docs/tasks.md is the guide for users.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.errors import EntrypointError
from orchestrator.model.base import TrainableModel
from orchestrator.model.task import Batch, Loss, Row, Task
from orchestrator.spec.task import TaskSpec
from orchestrator.user_code import calling_user, function_of, place_in_code

KEY = "task.entrypoint"
TWICE = "calls a model with experts more than once in a pass"
ONE_CALL = (
    "Call it once for any micro-batch, also for one without rows, and on all inputs together: experts of all ranks "
    "take part in each call, and are balanced by its load."
)
NUMBERS = "biuf"  # kinds of numpy's types: booleans, integers, floats
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")  # of a metric: what MLflow takes, without a slash


class UserTask:
    """Adapts what a user's function returns to a task, and names what is wrong with it.

    Args:
        built_in: collates rows of this kind where the user's task doesn't.

    Attributes:
        place: file and first line of the user's `loss`, before the text of errors; empty if it is no Python function.

    Raises:
        EntrypointError: the function can't be imported, raises, or returns no task.
    """

    def __init__(self, spec: TaskSpec, built_in: Task | None = None) -> None:
        assert spec.entrypoint is not None
        self._built_in = built_in
        self._name = f"{KEY} {spec.entrypoint}"
        make = function_of(KEY, spec.entrypoint, Path(spec.code_dir))
        with calling_user(self._name):
            self._task: Any = make(dict(spec.options))
        self.place = ""
        if not callable(getattr(self._task, "loss", None)):
            raise self._refused(f"returned a {type(self._task).__name__} without a method loss", "Return a task.")
        self.place = place_in_code(self._task.loss)
        metrics = getattr(self._task, "metrics", ())
        if not isinstance(metrics, tuple | list):
            raise self._refused(f"has the metrics {metrics!r}", 'Name them in a tuple: one is ("accuracy",).')
        self.metrics: tuple[str, ...] = tuple(metrics)
        self._check_names(self.metrics)
        self.needs_reference = bool(getattr(self._task, "needs_reference", False))

    def collate(self, rows: Sequence[Row], rng: np.random.Generator) -> Mapping[str, NDArray[np.generic]]:
        """By the user's `collate`; without one, as the built-in task of such rows, or each column's arrays stacked."""
        if not callable(getattr(self._task, "collate", None)):
            if self._built_in is not None:
                return self._built_in.collate(rows, rng)
            return {name: self._stacked(name, [row[name] for row in rows]) for name in rows[0]}
        with calling_user(f"collate of {self._name}"):
            arrays: Mapping[str, NDArray[np.generic]] = self._task.collate(rows, rng)
        is_named = isinstance(arrays, Mapping) and len(arrays) > 0
        if not is_named or not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise self._refused("collates rows to something else than numpy arrays by name", "Return a dict of arrays.")
        for name, array in arrays.items():
            if array.dtype.kind not in NUMBERS or not array.ndim or not len(array) or len(array) % len(rows):
                raise self._refused(
                    f"collates {len(rows)} rows to {name} of type {array.dtype} and shape {array.shape}",
                    "Return arrays of numbers or booleans whose first axis is the rows, or their parts: as many times "
                    "the number of rows as a row has parts.",
                )
        return arrays

    def _stacked(self, name: str, arrays: Sequence[NDArray[np.generic]]) -> NDArray[np.generic]:
        other = next((array for array in arrays if array.shape != arrays[0].shape), None)
        if other is not None:
            raise self._refused(
                f"has no method collate, and rows differ in {name}: one has the shape {arrays[0].shape}, another one "
                f"{other.shape}",
                "Write a collate(rows, rng) that pads them to one shape, or give all rows one.",
            )
        return np.stack(arrays)

    def loss(self, model: TrainableModel, batch: Batch) -> Loss:
        """The user's loss, checked."""
        with calling_user(f"loss of {self._name}"):
            if model.moe_layers and (torch.is_grad_enabled() or torch.distributed.is_initialized()):
                with self._calling_once(model):
                    loss = self._task.loss(model, batch)
            else:
                loss = self._task.loss(model, batch)
        if not isinstance(loss, Loss):
            raise self._refused(
                f"returned a {type(loss).__name__} as loss",
                "Return orchestrator.model.task.Loss(total, units): a sum over the units, not a mean.",
            )
        if not isinstance(loss.total, Tensor) or loss.total.shape != ():
            raise self._refused("returned a total that is no scalar tensor", "Sum it: loss.sum().")
        self._check_precision("a total", loss.total)
        if not isinstance(loss.metrics, Mapping) or tuple(loss.metrics) != self.metrics:
            raise self._refused(
                f"returned the metrics {', '.join(loss.metrics or ()) or 'none'}; `metrics` names "
                f"{', '.join(self.metrics) or 'none'}",
                "Return all of them, in this order, for every micro-batch.",
            )
        metrics = {name: self._pair(name, value, loss.total.device) for name, value in loss.metrics.items()}
        return Loss(loss.total, loss.units, metrics)

    @contextmanager
    def _calling_once(self, model: TrainableModel) -> Iterator[None]:
        """Context in which a model with experts is called once. A second call is refused before it meets the exchanges
        of other ranks' first one: the dry run's rows may not have shown it."""
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise self._refused(TWICE, ONE_CALL)

        hook = model.first_module.register_forward_pre_hook(count)
        try:
            yield
        finally:
            hook.remove()
        if calls != 1:  # also where the task has caught the error
            raise self._refused(TWICE if calls else "calls a model with experts not at all in a pass", ONE_CALL)

    def _pair(self, name: str, value: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        """A metric's sum and weight as scalar tensors; numbers are as good."""
        parts = value if isinstance(value, tuple) else ()
        if len(parts) != 2 or any(not isinstance(part, Tensor | int | float) for part in parts):
            raise self._refused(f"returned {name} as {type(value).__name__}", "A metric is a sum and its weight.")
        found = [  # numbers in the precision in which the vote adds them
            part.detach() if isinstance(part, Tensor) else torch.full((), part, dtype=torch.float64, device=device)
            for part in parts
        ]
        if any(part.shape != () for part in found):
            raise self._refused(f"returned {name} that is no scalar", "A metric is a sum and its weight.")
        for part in found:
            self._check_precision(name, part)
        return found[0], found[1]

    def _check_precision(self, name: str, value: Tensor) -> None:
        """Refuses a sum that was rounded to half precision: float32 would not bring its bits back, and gradients would
        be divided by a rounded number of units."""
        if value.dtype in (torch.bfloat16, torch.float16):
            raise self._refused(
                f"returned {name} of {str(value.dtype).removeprefix('torch.')}; sums must be float32",
                "Convert before you sum: loss.float().sum(), or logits.float() before the loss.",
            )

    def _check_names(self, names: Iterable[str]) -> None:
        wrong = [name for name in names if not isinstance(name, str) or not NAME.fullmatch(name)]
        if wrong:
            rule = "letters, digits, _, - and . only, and begin with a letter"
            raise self._refused(f"names a metric {wrong[0]!r}", f"Names of metrics have {rule}.")

    def report(self, means: Mapping[str, float]) -> dict[str, float]:
        """By the user's `report`; without one, the means."""
        if not callable(getattr(self._task, "report", None)):
            return dict(means)
        with calling_user(f"report of {self._name}"):
            found = {name: float(value) for name, value in self._task.report(means).items()}
        self._check_names(found)
        return found

    def _refused(self, what: str, remedy: str) -> EntrypointError:
        return EntrypointError(f"{self.place}{self._name} {what}", remedy=remedy)
