"""A plain-torch engine without partitions: the oracle that the DeepSpeed engine is compared with.

Every rank holds the full moments of its parameters; dense gradients are summed over the world, an expert's over its
replica set. fp32 only.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from orchestrator.elastic.state_spec import expert_of
from orchestrator.engine.base import StepOutcome, noop
from orchestrator.engine.process_groups import ProcessGroups
from orchestrator.model.base import TrainableModel
from orchestrator.model.moe.routing.balance import RoutingCounts
from orchestrator.model.task import Batch, Loss, Task
from orchestrator.model.tasks.language_modeling import LanguageModeling
from orchestrator.spec.train import TrainSpec
from orchestrator.state.ranges import NamedRanges


class ReferenceEngine:
    """Implements `orchestrator.engine.base.Engine`. Raises ValueError for a precision other than fp32."""

    def __init__(
        self, model: TrainableModel, train: TrainSpec, groups: ProcessGroups, task: Task | None = None
    ) -> None:
        if train.precision != "fp32":
            raise ValueError(f"precision {train.precision}; the reference engine has fp32 only")
        self._model, self._groups, self._max_norm = model, groups, train.gradient_clipping
        self._task = task or LanguageModeling()
        self._named = dict(model.named_parameters())
        decays = {n: train.optimizer.settings_of(n, p.shape).weight_decay for n, p in self._named.items()}
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [p for n, p in self._named.items() if decays[n] == decay], "weight_decay": decay}
                for decay in sorted(set(decays.values()))
            ],
            lr=train.lr,
            betas=train.optimizer.betas,
            eps=train.optimizer.eps,
        )
        for param in self._named.values():
            self._optimizer.state[param] = {
                "step": torch.tensor(0.0),  # where the unfused update reads it
                "exp_avg": torch.zeros_like(param),
                "exp_avg_sq": torch.zeros_like(param),
            }

    def accumulate(
        self,
        micro_batch: Batch,
        global_units: int,
        last: bool,
        before_backward: Callable[[], None] = noop,
        scale: int | None = None,
    ) -> tuple[Loss, RoutingCounts]:
        loss = self._task.loss(self._model, micro_batch)
        routed = self._model.routing_counts()
        before_backward()
        (self._model.with_balance_losses(loss.total, scale) / global_units).backward()
        return loss.detached(), routed

    def step(self, lr: float, before_update: Callable[[], None] = noop, keep_gradients: bool = False) -> StepOutcome:
        square = torch.zeros((), dtype=torch.float64, device=next(iter(self._named.values())).device)
        for name, param in self._named.items():
            grad = param.grad if param.grad is not None else torch.zeros_like(param)
            dist.all_reduce(grad, group=self._holders(name))
            param.grad = grad
            square += grad.double().square().sum() / dist.get_world_size(self._holders(name))
        dist.all_reduce(square, group=self._groups.world)
        norm = float(square.sqrt())
        applied = norm < float("inf")
        if applied:
            scale = min(1.0, self._max_norm / (norm + 1e-6)) if self._max_norm else 1.0
            for param in self._named.values():
                assert param.grad is not None
                param.grad.mul_(scale)
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            before_update()
            self._optimizer.step()
        gradients = self._gradients() if applied and keep_gradients else None
        self._optimizer.zero_grad()
        return StepOutcome(applied, norm if applied else float("inf"), gradients)

    def _gradients(self) -> NamedRanges:
        ranges = NamedRanges()
        for name, param in self._named.items():
            assert param.grad is not None
            ranges.add(f"grad/{name}", 0, param.grad.view(-1))
        return ranges

    @torch.no_grad()
    def evaluate(self, micro_batch: Batch) -> Loss:
        self._model.eval()
        loss = self._task.loss(self._model, micro_batch)
        self._model.train()
        return loss

    def idle_state(self) -> NamedRanges:
        return self.ranges()

    def ranges(self) -> NamedRanges:
        ranges = NamedRanges()
        for name, param in self._named.items():
            state = self._optimizer.state[param]
            ranges.add(f"param/{name}", 0, param.data.view(-1))
            ranges.add(f"exp_avg/{name}", 0, state["exp_avg"].view(-1))
            ranges.add(f"exp_avg_sq/{name}", 0, state["exp_avg_sq"].view(-1))
        for name, buffer in self._model.state_buffers():
            ranges.add(f"buffer/{name}", 0, buffer.view(-1))
        return ranges

    def on_weights_initialized(self) -> None:
        for param in self._named.values():
            self._optimizer.state[param]["exp_avg"].zero_()
            self._optimizer.state[param]["exp_avg_sq"].zero_()

    def on_state_loaded(self, num_updates: int) -> None:
        for param in self._named.values():
            self._optimizer.state[param]["step"].fill_(float(num_updates))

    def close(self) -> None:
        self._optimizer.zero_grad()

    def _holders(self, name: str) -> dist.ProcessGroup:
        expert = expert_of(name)
        if expert is None:
            return self._groups.world
        return self._groups.replicas[self._groups.placement.colours[self._groups.placement.holders[expert]]]
