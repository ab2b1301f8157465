"""Checkpoints that are copied beside the next step: the bytes of one for which training stops."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch._C._distributed_c10d import Store

from orchestrator.checkpoint.shard_image import ShardMemory
from orchestrator.elastic.expert_change import ExpertSet
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.world import World
from orchestrator.model.moe.routing.balance import RoutingCounts
from orchestrator.protocol.worker_report import ShardWritten
from orchestrator.worker.shard.shard import TrainingProgress
from orchestrator.worker.step.routing import move_router_state
from orchestrator.worker.transition.save_shard import ShardSaver
from tests.support import devices, small
from tests.support.ranks import Ranks

BEFORE = 3  # steps until the state is saved
TOPK = {"scheme": "topk", "error_feedback": True, "momentum": 0.9}
POWERSGD = {"scheme": "powersgd", "error_feedback": True}


def _saves(
    rank: int, world_size: int, store: Store, prefix: str, directory: str, precision: str, compression: dict[str, Any]
) -> list[Path]:
    """Files of this rank: of a state for which training stops, of the same one whose copy is made only when the next
    step's update is about to begin, and of the state after that step."""
    placement = ExpertPlacement.balanced(4, world_size)
    train, communication = small.train_spec(precision), {"compression": compression}
    groups, model, engine = small.build("deepspeed", store, prefix, rank, placement, train, **communication)
    world = World(0, tuple(f"w{r}" for r in range(world_size)))
    shard: Any = SimpleNamespace(
        term=1, rank=rank, world=world, groups=groups, engine=engine, seal=None, experts=ExpertSet(4)
    )
    spec: Any = SimpleNamespace(model=small.model_spec(), train=train)
    tensors, written = small.layout_of(placement, precision, **communication).tensors, list[ShardWritten]()

    def fail(*args: object) -> None:
        raise AssertionError(args)

    saver = ShardSaver(Path(directory), lambda _: tensors, "", "", written.append, fail, fail, device=devices.device())
    may_copy = threading.Event()

    def late_copy(*args: Any) -> ShardMemory:
        assert may_copy.wait(60.0)
        return ShardMemory(*args)

    def before_update() -> None:
        may_copy.set()
        saver.copied()

    def step(number: int) -> None:
        tokens = small.NUM_SLOTS * small.ROWS * small.LENGTH
        mine, routed = (
            range(rank, small.NUM_SLOTS, world_size),
            RoutingCounts.zeros(len(model.moe_layers), spec.model, devices.device()),
        )
        for slot in mine:
            _, counts = engine.accumulate(small.micro_batch(number, slot), tokens, slot == mine[-1])
            routed.add(counts)
        torch.distributed.all_reduce(routed.counts_LE)
        routed = RoutingCounts.of(routed.counts_LE.cpu(), routed.margins_LEM.cpu())
        assert engine.step(3e-3, before_update).applied
        move_router_state(spec, model, routed, number)

    for number in range(BEFORE):
        step(number)
    files = []
    for generation, is_late in enumerate((False, True, False)):
        shard.world = World(generation, shard.world.members)
        with patch("orchestrator.worker.transition.save_shard.ShardMemory", late_copy if is_late else ShardMemory):
            may_copy.clear()
            saver.save(shard, TrainingProgress(BEFORE, BEFORE, "{}"))
            if is_late:
                step(BEFORE)
            assert saver.wait(60.0)
        (file,) = Path(directory).glob(f"*-{generation:06d}/shard-{rank:05d}-*")
        files.append(file)
    assert len(written) == 3
    engine.close()
    return files


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("compression", [TOPK, POWERSGD], ids=["topk with momentum", "powersgd"])
def test_a_state_copied_beside_the_next_step_has_the_bytes_of_one_for_which_training_stops(
    ranks: Ranks, tmp_path: Path, precision: str, compression: dict[str, Any]
) -> None:
    kinds = {"master", "exp_avg", "exp_avg_sq", "buffer", "residual"}
    kinds |= {"powersgd"} if compression["scheme"] == "powersgd" else {"velocity"}
    found: dict[str, bool] = {}
    for still, beside, after in ranks.run(_saves, 2, str(tmp_path), precision, compression):
        assert beside.read_bytes() == still.read_bytes()
        old, new = load_file(still), load_file(after)
        for key, values in old.items():
            kind = key.partition("/")[0]
            found[kind] = found.get(kind, False) or not np.array_equal(values, new[key])
    assert found == dict.fromkeys(kinds, True)  # the step has changed all of it
