"""A user's own task: `task: {entrypoint: "package.module:function"}`.

    def function(options: dict) -> Task

What it returns has `loss(model, batch)`, and may have `collate(rows, rng)`, `metrics` and `report(means)`
(`orchestrator.model.task.Task`). docs/tasks.md is the guide for users.
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
from orchestrator.user_code import calling_user, function_of

KEY = "task.entrypoint"
TWICE = "calls a model with experts more than once in a pass"
ONE_CALL = (
    "Call it once for any micro-batch, also for one without rows, and on all inputs together: experts of all ranks "
    "take part in each call, and are balanced by its load."
)
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")  # of a metric: what MLflow takes, without a slash


class UserTask:
    """Adapts what a user's function returns to a task, and names what is wrong with it.

    Args:
        built_in: collates rows of this kind where the user's task doesn't.

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
        if not callable(getattr(self._task, "loss", None)):
            raise self._refused(f"returned a {type(self._task).__name__} without a method loss", "Return a task.")
        self.metrics: tuple[str, ...] = tuple(getattr(self._task, "metrics", ()))
        self._check_names(self.metrics)

    def collate(self, rows: Sequence[Row], rng: np.random.Generator) -> Mapping[str, NDArray[np.generic]]:
        """By the user's `collate`; without one, as the built-in task of such rows, or each column's arrays stacked."""
        with calling_user(f"collate of {self._name}"):
            if callable(getattr(self._task, "collate", None)):
                arrays = self._task.collate(rows, rng)
            elif self._built_in is not None:
                arrays = self._built_in.collate(rows, rng)
            else:
                arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        if not isinstance(arrays, Mapping) or not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise self._refused("collates rows to something else than numpy arrays by name", "Return a dict of arrays.")
        return arrays

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
        if not isinstance(loss.metrics, Mapping) or tuple(loss.metrics) != self.metrics:
            raise self._refused(
                f"returned the metrics {', '.join(loss.metrics or ()) or 'none'}; `metrics` names "
                f"{', '.join(self.metrics) or 'none'}",
                "Return all of them, in this order, for every micro-batch.",
            )
        metrics = {name: self._pair(name, value, loss.total) for name, value in loss.metrics.items()}
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

    def _pair(self, name: str, value: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        """A metric's sum and weight as scalar tensors; numbers are as good."""
        parts = value if isinstance(value, tuple) else ()
        if len(parts) != 2 or any(not isinstance(part, Tensor | int | float) for part in parts):
            raise self._refused(f"returned {name} as {type(value).__name__}", "A metric is a sum and its weight.")
        found = [part.detach() if isinstance(part, Tensor) else torch.full_like(like.detach(), part) for part in parts]
        if any(part.shape != () for part in found):
            raise self._refused(f"returned {name} that is no scalar", "A metric is a sum and its weight.")
        return found[0], found[1]

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
        return EntrypointError(f"{self._name} {what}", remedy=remedy)
