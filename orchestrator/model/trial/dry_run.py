"""Dry run of a user's own model or task: build them, and run forward and backward passes on rows and on no rows.

Workers run it while they warm up, and a process at submission (`orchestrator.worker.check_user_code`), so that mistakes
are reported at once.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from orchestrator.elastic.state_spec import ParamSpec
from orchestrator.errors import EntrypointError
from orchestrator.model.base import TrainableModel
from orchestrator.model.draws import seed_draws
from orchestrator.model.factory import build_model, single_rank
from orchestrator.model.moe.routed_experts import RoutedExperts, is_recomputed
from orchestrator.model.task import Batch, Loss, Row, Task
from orchestrator.model.tasks.user_task import UserTask
from orchestrator.model.trial.isolation import check_isolation
from orchestrator.model.trial.samples import Samples, drawn_chats
from orchestrator.model.user_rules import shown
from orchestrator.spec.job import JobSpec
from orchestrator.spec.task import UNITS
from orchestrator.user_code import calling_user

MAX_ELEMENTS = 200_000_000  # of dense parameters; a larger model isn't built on a laptop, nor whole by each worker
SAME = 1e-3  # relative difference of losses that are taken to be equal


def is_small(params: Sequence[ParamSpec]) -> bool:
    """Whether a model with these parameters, of which a dry run has all but experts, takes little memory."""
    return sum(param.numel for param in params if param.expert is None) <= MAX_ELEMENTS


def rehearse(job: JobSpec, vocab_size: int, task: Task, device: torch.device, rows: Sequence[Row] = ()) -> None:
    """Run a user's model and task without an update, in a world of one and with as few experts as routing needs.

    Args:
        rows: of the data, two if there are; none for text and chats, in whose place are rows of drawn tokens.

    Raises:
        EntrypointError: they can't be trained.
    """
    few = min(max(2, job.model.num_experts_per_tok), job.model.n_routed_experts)  # a group's score is that of two
    spec = job.model.model_copy(update={"n_routed_experts": few, "n_group": 1, "topk_group": 1})
    with device:
        model = build_model(spec, vocab_size, single_rank(spec))
    model.init_weights(job.train.seed)
    if job.data.isolate_documents:
        check_isolation(job, model, task, vocab_size, device)
    if job.train.precision == "bf16":
        for param in model.parameters():  # buffers keep their dtype, as in the engine
            param.data = param.data.bfloat16()
    trial = _Trial(job, model, task)
    if not rows and job.has_chats:
        rows = drawn_chats(job, vocab_size, task.needs_reference)
    samples = Samples(job, task, device, rows, vocab_size)
    first = trial.run(samples.of(0))
    if job.train.is_exact or (job.task.entrypoint is not None and device.type == "cpu"):
        trial.check_repeats(first, trial.run(samples.of(0)))
    both = trial.run(samples.of(0, samples.last))
    if job.task.entrypoint is not None:
        trial.check_sum(both, first, trial.run(samples.of(samples.last)))
        task.report(dict.fromkeys(task.metrics, 0.0))
    for other in (both, trial.run(samples.of())):
        trial.check_calls(first, other)


@dataclass(frozen=True)
class _Pass:
    """Result of a pass: its loss, gradients by parameter name, and how often it called the model."""

    loss: float
    grads: dict[str, Tensor]
    num_calls: int
    rows: str


class _Trial:
    """Passes of a model and a task, and what is wrong with them."""

    def __init__(self, job: JobSpec, model: TrainableModel, task: Task) -> None:
        self._job, self._model, self._task = job, model, task
        of_model = None if job.model.is_native else job.model.origin
        own = [name for name in (job.task.entrypoint, of_model) if name is not None]
        self._name = " with ".join(own)
        self._place = task.place if isinstance(task, UserTask) else ""
        self._calls = 0
        # Those that aren't kept are compared from the first pass on, which may make tables.
        self._buffers = {name: buffer.clone() for name, buffer in model.state_buffers()}
        model.first_module.register_forward_hook(self._count)
        self._layers = {module: name for name, module in model.named_modules() if isinstance(module, RoutedExperts)}
        self._layer_calls = Counter[str]()
        for layer in self._layers:
            layer.register_forward_pre_hook(self._count_layer)

    def _count(self, *_: object) -> None:
        self._calls += 1

    def _count_layer(self, layer: nn.Module, _: object) -> None:
        if isinstance(layer, RoutedExperts) and not is_recomputed():
            self._layer_calls[self._layers[layer]] += 1

    def run(self, sample: tuple[Batch, int]) -> _Pass:
        """A forward and backward pass."""
        batch, units = sample
        num_rows = len(next(iter(batch.values())))
        rows = "no rows" if not num_rows else "a row" if num_rows == 1 else f"{num_rows} rows"
        self._calls = 0
        self._layer_calls.clear()
        try:
            with torch.random.fork_rng(), calling_user(f"a pass of {self._name} on {rows}"):
                seed_draws(0, 0, 0)
                loss = self._task.loss(self._model, batch)
                self._check_loss(loss, units, rows)
                scale = units if self._job.has_rows else None
                self._model.with_balance_losses(loss.total, scale).backward()  # type: ignore[no-untyped-call]
        except EntrypointError as error:
            if not num_rows and error.__cause__ is not None:  # an exception of the user's code
                error.remedy = (
                    "A rank that has no part of the global batch left runs such passes, so that all ranks keep step. "
                    "Write sizes out where view or reshape has to guess a -1."
                )
            raise
        self._check_layers(rows)
        self._check_buffers(rows)
        return _Pass(float(loss.total.detach()), self._grads(rows), self._calls, rows)

    def _check_loss(self, loss: Loss, units: int, rows: str) -> None:
        counts_itself = not self._job.has_rows or self._job.has_chats  # tokens, which the data count
        if loss.units != units and not (counts_itself and loss.units is None):
            raise EntrypointError(
                f"{self._place}the loss of {self._name} on {rows} is a sum over {loss.units} units; the data have "
                f"{units}",
                remedy="Return Loss(total, units) with the sum over the rows and their number, or that of their column "
                f"`{UNITS}`.",
            )
        if not math.isfinite(float(loss.total.detach())):
            raise EntrypointError(
                f"{self._place}the loss of {self._name} on {rows} is {float(loss.total.detach())}",
                remedy="A loss must be finite with first weights, and 0 on no rows.",
            )

    def _check_layers(self, rows: str) -> None:
        wrong = [name for name in self._layers.values() if self._layer_calls[name] != 1]
        if wrong:
            raise EntrypointError(
                f"a pass of {self._name} on {rows} calls {shown(wrong)} {self._layer_calls[wrong[0]]} times; a layer "
                "of experts is called once in a pass, because all ranks exchange tokens then and its load is that of "
                "one call",
                remedy="Make a MoELayer for each use, and call it on any rows, also on none.",
            )

    def _check_buffers(self, rows: str) -> None:
        """Raises EntrypointError if the pass has changed buffers. A table that isn't kept may grow with the rows."""
        kept, now = {name for name, _ in self._model.state_buffers()}, dict(self._model.named_buffers())
        changed = [
            f"{name} of {type(self._model.get_submodule(name.rpartition('.')[0])).__name__}"
            for name, before in self._buffers.items()
            if name in now and (name in kept or now[name].shape == before.shape) and not torch.equal(now[name], before)
        ]
        self._buffers = {name: buffer.clone() for name, buffer in now.items()}
        if changed:
            raise EntrypointError(
                f"a pass of {self._name} on {rows} changes buffers {shown(changed)}; a pass must leave them as they "
                "are, because ranks see different rows and would have different ones",
                remedy="Compute what you need from parameters and the pass's own rows, use LayerNorm or GroupNorm in "
                "place of BatchNorm, and keep running statistics out of the model.",
            )

    def _grads(self, rows: str) -> dict[str, Tensor]:
        model = self._model
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and not p.grad.is_sparse}
        without = [name for name, _ in model.named_parameters() if name not in grads]
        model.zero_grad(set_to_none=True)
        if without:
            raise EntrypointError(
                f"parameters {shown(without)} of {self._name} have no dense gradient after a pass on {rows}",
                remedy="Every parameter must take part in every pass, as ranks add up gradients. Remove unused ones.",
            )
        return grads

    def check_repeats(self, first: _Pass, second: _Pass) -> None:
        """Raises EntrypointError if a second pass on the same row had other gradients."""
        differing = [name for name, grad in first.grads.items() if not torch.equal(grad, second.grads[name])]
        if differing:
            why = " and train.determinism is exact" if self._job.train.is_exact else " so it matters which rank runs it"
            raise EntrypointError(
                f"parameters {shown(differing)} of {self._name} have another gradient in a second pass on the same "
                f"row,{why}",
                remedy="Draw random numbers in a pass from torch's own generator, as dropout does, and from no other; "
                "use only deterministic operations; or set train.determinism: fast.",
            )

    def check_sum(self, both: _Pass, first: _Pass, last: _Pass) -> None:
        """Raises EntrypointError if the loss of two rows is the mean of their losses, and not the sum. It may be
        neither, where rows are compared with each other."""
        total = first.loss + last.loss
        if _is_near(both.loss, total / 2) and not _is_near(both.loss, total):
            raise EntrypointError(
                f"{self._place}the loss of {self._name} is a mean: {first.loss:.6g} and {last.loss:.6g} of two rows, "
                f"and of both {both.loss:.6g}",
                remedy="Return the sum over the micro-batch's units. It is divided by the number of units of the whole "
                "global batch, of which a rank has only a part.",
            )

    def check_calls(self, first: _Pass, other: _Pass) -> None:
        """Raises EntrypointError if another pass calls the model less or more often."""
        if first.num_calls != other.num_calls:
            raise EntrypointError(
                f"{self._place}a pass of {self._name} calls the model {first.num_calls} times on a row and "
                f"{other.num_calls} times on {other.rows}",
                remedy="Call it equally often for any micro-batch: experts of all ranks take part in each call.",
            )


def _is_near(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=SAME, abs_tol=1e-9)
