"""The training engine: DeepSpeed ZeRO 1 or 2 around our model, rebuilt in place for every generation.

What is ours and why:
- Parameter groups (`orchestrator.engine.param_groups`), and the sum of gradients over micro-batches and ranks
  (`orchestrator.comm.gradients.buckets`): in fp32, with bf16 weights too, and during the backward pass.
  DeepSpeed receives this rank's pieces of the sums, and clips, updates and gathers weights
  (`orchestrator.engine.deepspeed.zero_optimizer`).
- Gradients are summed, not averaged: a micro-batch's loss is already divided by the global batch's token count.
- All weights come from the seed or from a transfer, so DeepSpeed's broadcast at build is disabled.

Written against deepspeed 0.19.8; `tests/integration/test_engine.py` compares with stock DeepSpeed and with plain torch.
"""

from collections.abc import Callable
from typing import Any

import orchestrator.engine.deepspeed.imports  # noqa: F401  # isort: skip  # before anything of deepspeed
import torch
from deepspeed.moe.layer import MoE
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

from orchestrator.comm.tokens import link_priority
from orchestrator.elastic.state_spec import BUFFER, EMA, MASTER, PARAM
from orchestrator.engine.base import StepOutcome, noop
from orchestrator.engine.deepspeed.process_setup import config_of, set_up, unregister
from orchestrator.engine.deepspeed.zero_optimizer import ZeroOptimizerAdapter
from orchestrator.engine.gradients import Gradients
from orchestrator.engine.optim.rule import UpdateInfo
from orchestrator.engine.optim.stepper import ParamPart, Stepper, places
from orchestrator.engine.param_groups import groups_of, is_filler
from orchestrator.engine.process_groups import ProcessGroups
from orchestrator.engine.pruning.pruner import Pruner
from orchestrator.model.base import TrainableModel, spec_of
from orchestrator.model.compiled import compile_parts
from orchestrator.model.linear.fake_quant import use_fake_quantization
from orchestrator.model.linear.float8 import use_float8
from orchestrator.model.moe.routed_experts import RoutedExperts
from orchestrator.model.moe.routing.balance import RoutingCounts
from orchestrator.model.task import Batch, Loss, Task
from orchestrator.model.tasks.language_modeling import LanguageModeling
from orchestrator.spec.communication import CommunicationSpec
from orchestrator.spec.train import TrainSpec
from orchestrator.state.ranges import NamedRanges

DEFAULT = CommunicationSpec()
LANGUAGE_MODELING = LanguageModeling()


class _ExpertMarker(MoE):  # type: ignore[misc]
    """A parameter-free child that marks the model as having experts: DeepSpeed only checks isinstance(module, MoE)."""

    def __init__(self, num_experts: int) -> None:
        nn.Module.__init__(self)
        self.num_experts = num_experts

    def set_deepspeed_parallelism(self, *args: Any, **kwargs: Any) -> None:
        """The groups are ours and already registered."""


class _Core(DeepSpeedEngine):  # type: ignore[misc]
    """DeepSpeed's engine without its costly and unused parts."""

    def _broadcast_model(self) -> None:
        """Weights come from the seed or a transfer, equal on all ranks by construction and checked by digest."""

    def _do_optimizer_sanity_check(self, basic_optimizer: Any) -> str:
        """ZeRO at both stages: bf16 with fp32 accumulation at stage 1 would become another optimizer class."""
        return "zero_optimization"


def _set_up(model: TrainableModel, train: TrainSpec) -> None:
    """Let only the parameters that are trained need gradients, and layers know whether experts of any rank do."""
    if train.float8:
        use_float8(model)
    if train.quantization is not None:
        use_fake_quantization(model, train.quantization)
    if train.torch_compile:
        compile_parts(model)
    for name, param in model.named_parameters():
        param.requires_grad_(train.is_trained(name))
    for prefix, layer in model.named_modules():
        if isinstance(layer, RoutedExperts):
            names = (f"{prefix}.experts.{e}.{part}" for e in range(layer.num_experts) for part in layer.expert_parts)
            layer.trains_experts = any(train.is_trained(name) for name in names)


class DeepSpeedEngineAdapter:
    """Implements `orchestrator.engine.base.Engine`.

    Args:
        model: with this rank's experts; weights may still be unset.
        train: optimizer, precision, stage, clipping.
        task: gives the loss of a micro-batch.
    """

    def __init__(
        self,
        model: TrainableModel,
        train: TrainSpec,
        groups: ProcessGroups,
        device: torch.device,
        communication: CommunicationSpec = DEFAULT,
        task: Task = LANGUAGE_MODELING,
    ) -> None:
        self._model, self._task, self._device = model, task, device
        self._has_masters = train.has_masters
        has_experts = bool(model.moe_layers)
        set_up(groups, device)
        if has_experts:
            model.add_module("_expert_marker", _ExpertMarker(groups.placement.num_experts))
        _set_up(model, train)
        param_groups = groups_of(model, groups, communication, train.optimizer)
        for_deepspeed = [group.for_deepspeed() for group in param_groups]
        self._stepper, self._num_updates = Stepper(for_deepspeed, train), 0
        config = config_of(train)
        self._core = _Core(
            args=None,
            model=model,
            optimizer=self._stepper,
            model_parameters=[p for group in param_groups for p in group.everything],
            config=config,
            config_class=DeepSpeedConfig(config),
        )
        self._zero = self._core.optimizer
        together = groups.reduction is groups.world
        self._gradients = Gradients(model, param_groups, communication, train, device, together)
        self._adapter = ZeroOptimizerAdapter(self._zero, groups.exchange, train.is_exact)
        self._pruning = train.pruning
        self._pruner = None if train.pruning is None else Pruner(model, train.pruning)
        self._sparsity: float | None = None  # unknown before the first step
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._owned = self._find_owned()
        self._name_parts(train)
        self._make_optimizer_state()
        self._ranges = self._collect_ranges()

    @property
    def gradients(self) -> Gradients:
        """The engine's gradients, for the tuner of their compression."""
        return self._gradients

    @property
    def order(self) -> list[str]:
        """Buckets of dense gradients as they are sent, each by its parameters: the same on all ranks."""
        return self._gradients.order

    # -- training ----------------------------------------------------------------------------------------------

    def accumulate(
        self,
        micro_batch: Batch,
        global_units: int,
        last: bool,
        before_backward: Callable[[], None] = noop,
        scale: int | None = None,
    ) -> tuple[Loss, RoutingCounts]:
        link_priority.begin()
        loss = self._task.loss(self._model, micro_batch)
        routed = self._model.routing_counts()
        before_backward()
        self._gradients.begin_micro_batch(last)
        whole = self._model.with_balance_losses(loss.total, scale)
        (whole / global_units).backward()  # type: ignore[no-untyped-call]
        self._gradients.end_micro_batch()
        return loss.detached(), routed

    def step(self, lr: float, before_update: Callable[[], None] = noop, keep_gradients: bool = False) -> StepOutcome:
        self._stepper.before_update, self._stepper.at = before_update, UpdateInfo(self._num_updates + 1, lr)
        self._stepper.gradients = {} if keep_gradients else None
        prunes = self._begin_pruning()
        applied, norm = self._adapter.step(self._gradients.sums())
        self._end_pruning(prunes and applied)
        self._gradients.settle(applied)
        self._num_updates += applied
        kept, self._stepper.gradients = self._stepper.gradients, None
        updated = self._updated(kept) if applied and kept is not None else None
        return StepOutcome(applied, norm, updated, self._gradients.saturated, self._sparsity or 0.0)

    def _begin_pruning(self) -> bool:
        """Whether the next update prunes; what it prunes is decided then."""
        self._stepper.pruned = None
        if self._pruner is None or self._pruning is None or not self._pruning.is_due(self._num_updates + 1):
            return False
        self._pruner.begin(self._num_updates + 1)
        self._stepper.pruned = self._pruner.pruned
        return True

    def _end_pruning(self, has_pruned: bool) -> None:
        if self._pruner is not None:
            self._pruner.end()
            if has_pruned or self._sparsity is None:
                self._sparsity = self._measured_sparsity()

    def _measured_sparsity(self) -> float:
        """Share of zeros in what is pruned. Each element counts once, on the rank that updates it."""
        counts = [0, 0]
        for master in self._zero.single_partition_of_fp32_groups:
            for part in self._stepper.parts[id(master)]:
                if part.param.is_pruned:
                    counts[0] += int((master.detach()[part.here] == 0).sum())
                    counts[1] += part.here.stop - part.here.start
        total = torch.tensor(counts, dtype=torch.int64, device=self._device)
        num_zeros, num_pruned = map(int, self._adapter.over_ranks(total, torch.distributed.ReduceOp.SUM))
        return num_zeros / max(num_pruned, 1)

    def _updated(self, kept: dict[int, Tensor]) -> NamedRanges:
        ranges = NamedRanges()
        for index, master in enumerate(self._zero.single_partition_of_fp32_groups):
            for name, start, here in self._owned[index]:
                ranges.add(f"grad/{name}", start, kept[id(master)][here])
        return ranges

    @torch.no_grad()
    def evaluate(self, micro_batch: Batch) -> Loss:
        self._model.eval()
        loss = self._task.loss(self._model, micro_batch)
        self._model.train()
        return loss

    # -- state -------------------------------------------------------------------------------------------------

    def ranges(self) -> NamedRanges:
        if not self._gradients.keeps:
            return self._ranges
        ranges = self._ranges.detached()
        self._gradients.add_to(ranges)
        return ranges

    def idle_state(self) -> NamedRanges:
        ranges = self._ranges.detached()
        for index, master in enumerate(self._zero.single_partition_of_fp32_groups):
            for name, start, here in [] if self._has_masters else self._owned[index]:
                ranges.add(f"{MASTER}/{name}", start, master.detach()[here])
        return ranges

    @torch.no_grad()
    def on_weights_initialized(self) -> None:
        self._num_updates = 0
        self._copy_weights_to_masters()
        for master, kept in self._stepper.state.items():
            for kind, tensor in kept.items():
                tensor.copy_(master) if kind == EMA else tensor.zero_()
        self._gradients.on_weights_initialized()

    @torch.no_grad()
    def on_state_loaded(self, num_updates: int) -> None:
        if not self._has_masters:  # the weights are the masters; DeepSpeed keeps its partition as a copy
            self._copy_weights_to_masters()
        self._num_updates = num_updates
        self._gradients.on_state_loaded(num_updates)

    def _copy_weights_to_masters(self) -> None:
        for index, master in enumerate(self._zero.single_partition_of_fp32_groups):
            master.copy_(self._zero.parallel_partitioned_bit16_groups[index][self._partition_rank(index)])

    def close(self) -> None:
        self._gradients.close()
        self._core.destroy()
        self._core.optimizer = None
        unregister()

    def _partition_rank(self, group: int) -> int:
        return int(torch.distributed.get_rank(self._zero.real_dp_process_group[group]))

    def _make_optimizer_state(self) -> None:
        """Create it before the first step, so that a transfer has memory to write to; it needn't be zeroed."""
        for index, master in enumerate(self._zero.single_partition_of_fp32_groups):
            self._stepper.state[master] = self._stepper.empty_state(index, master)

    def _name_parts(self, train: TrainSpec) -> None:
        """Let the optimizer know what its partitions hold."""
        params = {name: spec_of(name, p).with_settings(train) for name, p in self._model.named_parameters()}
        for master, owned in zip(self._zero.single_partition_of_fp32_groups, self._owned, strict=True):
            self._stepper.parts[id(master)] = [ParamPart(params[name], here, start) for name, start, here in owned]

    def _find_owned(self) -> list[list[tuple[str, int, slice]]]:
        """Contents of this rank's partition by group: a parameter's name, the element where its part begins, and its
        slice of the partition."""
        found: list[list[tuple[str, int, slice]]] = []
        for index, params in enumerate(self._zero.round_robin_bit16_groups):
            size = self._zero.partition_size[index]
            low = self._partition_rank(index) * size
            owned = []
            for param, offset in zip(params, self._zero.round_robin_bit16_offsets[index], strict=True):
                start, stop = max(offset, low), min(offset + param.numel(), low + size)
                if start < stop and not is_filler(self._names[id(param)]):
                    owned.append((self._names[id(param)], start - offset, slice(start - low, stop - low)))
            found.append(owned)
        return found

    def _collect_ranges(self) -> NamedRanges:
        ranges = NamedRanges()
        for name, param in self._model.named_parameters():
            if not is_filler(name):
                ranges.add(f"{PARAM}/{name}", 0, param.data.view(-1))
        for index, master in enumerate(self._zero.single_partition_of_fp32_groups):
            for name, start, here in self._owned[index]:
                if self._has_masters:
                    ranges.add(f"{MASTER}/{name}", start, master.detach()[here])
            for kind, tensor in self._stepper.state[master].items():
                where = places(kind, self._stepper.parts[id(master)])
                for (name, start, _), here in zip(self._owned[index], where, strict=True):
                    ranges.add(f"{kind}/{name}", start, tensor[here])
        for name, buffer in self._model.state_buffers():
            ranges.add(f"{BUFFER}/{name}", 0, buffer.view(-1))
        return ranges
