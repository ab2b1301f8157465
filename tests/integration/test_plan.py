"""A plan's memory and traffic, compared with the state and traffic of real ranks."""

import gc
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.engine.process_groups import disconnect
from orchestrator.model.factory import catalogue
from orchestrator.policy.estimate.job_plan import WorldPlan, plan_job
from orchestrator.policy.estimate.worker_memory import StatePlan
from orchestrator.policy.health.expert_load import NUM_MARGIN_BINS
from orchestrator.spec.job import JobSpec
from orchestrator.spec.workers import WorkersSpec
from tests.support import small
from tests.support.ranks import Ranks


def _plan(world_size: int, precision: str, stage: int, determinism: str) -> WorldPlan:
    train = small.train_spec(precision, stage, determinism=determinism)
    workers = WorkersSpec(min=world_size, max=world_size)
    job = JobSpec(name="planned", model=small.model_spec(), train=train, workers=workers)
    params, buffers = catalogue(job.model, small.VOCAB)
    return plan_job(job, StatePlan(tuple(params), tuple(buffers), small.VOCAB)).worlds[0]


def _tensor_bytes() -> int:
    gc.collect()
    found: dict[int, int] = {}
    for held in gc.get_objects():
        if isinstance(held, torch.Tensor):
            for tensor in (held, held.grad if held.is_leaf else None):
                if tensor is not None:
                    found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(found.values())


COUNTED_BYTES = 2 * 4 * NUM_MARGIN_BINS * 8  # by the routers of the last micro-batch: 2 layers, 4 experts


class _Counted:
    """Bytes that leave this rank by collectives, as a ring sends them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.sent: Counter[str] = Counter()
        self._patch, self._within = patch, 0
        self._wrap(
            "all_to_all_single", lambda out, x, received=None, sent=None, group=None, **k: _leaves(x, sent, group)
        )
        self._wrap("all_reduce", lambda x, *a, group=None, **k: 2 * _shared(x, group))
        for name in ("all_gather_into_tensor", "all_gather_single", "_all_gather_base"):
            self._wrap(name, lambda out, x, group=None, **k: _shared(out, group))
        self._wrap("all_gather", lambda outs, x, group=None, **k: sum(_shared(out, group) for out in outs))

    def _wrap(self, name: str, size: Callable[..., float]) -> None:
        if (real := getattr(dist, name, None)) is None:
            return

        def counted(*args: Any, **kwargs: Any) -> Any:
            if not self._within:  # some are made of others
                named = _renamed(kwargs)
                is_even = name == "all_to_all_single" and len(args) == 2 and "sent" not in named
                self.sent["equal pieces" if is_even else name] += round(size(*args, **named))
            self._within += 1
            try:
                return real(*args, **kwargs)
            finally:
                self._within -= 1

        self._patch.setattr(dist, name, counted)


def _renamed(kwargs: dict[str, Any]) -> dict[str, Any]:
    names = {"tensor": "x", "input_tensor": "x", "input": "x", "output_tensor": "out", "output": "out"}
    names |= {"output_split_sizes": "received", "input_split_sizes": "sent", "tensor_list": "outs"}
    return {names.get(name, name): value for name, value in kwargs.items()}


def _shared(tensor: torch.Tensor, group: Any) -> float:
    size = dist.get_world_size(group)
    return tensor.nbytes * (size - 1) / size


def _leaves(x: torch.Tensor, sent: list[int] | None, group: Any) -> float:
    if sent is None:
        return _shared(x, group)
    row = x.nbytes // max(len(x), 1)
    return row * (sum(sent) - sent[dist.get_rank()])


@cache
def _make_what_is_made_once() -> None:
    """Do a step alone, so that the tensors that a process makes once and keeps aren't counted."""
    placement = ExpertPlacement.balanced(4, 1)
    groups, _, engine = small.build("deepspeed", HashStore(), "alone", 0, placement, small.train_spec("fp32", 1))
    small.train_steps(engine, groups, range(1))
    engine.close()
    disconnect()


def _measured(
    rank: int, world_size: int, store: Store, prefix: str, precision: str, stage: int, determinism: str
) -> tuple[dict[str, int], int, int, Counter[str]]:
    """Bytes of state by part, of all tensors after building and before an update, and what was sent in a step."""
    _make_what_is_made_once()
    before = _tensor_bytes()
    train = small.train_spec(precision, stage, determinism=determinism)
    with pytest.MonkeyPatch.context() as patch:
        counted = _Counted(patch)
        groups, _, engine = small.build(
            "deepspeed", store, prefix, rank, ExpertPlacement.balanced(4, world_size), train
        )
        parts: Counter[str] = Counter()
        for name, held in engine.ranges():
            parts[name.partition("/")[0]] += held.data.nbytes
        built = _tensor_bytes() - before
        for number in range(2):
            engine.accumulate(small.micro_batch(0, number), 1000, number == 1)
        accumulated = _tensor_bytes() - before
        engine.step(1e-3)
        counted.sent.clear()
        small.train_steps(engine, groups, range(1))
        engine.close()
    return dict(parts), built, accumulated, counted.sent


@pytest.mark.on_cpu  # whose tensors are counted in memory
@pytest.mark.parametrize("determinism", ["fast", "exact"])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_plan_equals_the_state_and_traffic_of_real_ranks(
    ranks: Ranks, world_size: int, precision: str, stage: int, determinism: str
) -> None:
    plan = _plan(world_size, precision, stage, determinism)
    measured = ranks.run(_measured, world_size, precision, stage, determinism)
    memory = plan.memory
    parts, built, accumulated, _ = max(measured, key=lambda found: sum(found[0].values()))
    assert memory.weights == parts["param"]
    assert memory.moments == parts["exp_avg"] + parts["exp_avg_sq"]
    assert memory.buffers == parts["buffer"]
    state = memory.weights + memory.masters + memory.moments + memory.buffers
    assert built == pytest.approx(state, rel=0.02)  # padding, and what isn't state
    if stage == 1:
        assert accumulated - built == pytest.approx(memory.gradients, abs=0.01 * memory.gradients + COUNTED_BYTES)
    else:  # the bucket is gone again
        assert 0 < accumulated - built <= memory.gradients

    sent: Counter[str] = sum((found[3] for found in measured), Counter())
    traffic = plan.traffic
    assert sent["all_to_all_single"] == pytest.approx(traffic.dispatch + traffic.combine, rel=0.15)  # routes vary
    assert sent["equal pieces"] == pytest.approx(traffic.gradients_reduced, rel=0.01)  # padding
    gathered = sent["all_gather_single"] + sent["all_gather_into_tensor"] + sent["all_gather"]
    assert gathered == pytest.approx(traffic.parameters_gathered, rel=0.01)  # and expert counts
