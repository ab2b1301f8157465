"""Set-up of DeepSpeed in this process before an engine is built: its config, its process groups, its collectives.

Its shared-memory op is disabled.
"""

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import deepspeed
import deepspeed.comm.comm
import deepspeed.ops
import torch
from deepspeed.utils import groups as registry
from deepspeed.utils import logger as deepspeed_logger

from orchestrator.comm import collective_stats
from orchestrator.engine.param_groups import group_name
from orchestrator.engine.process_groups import ProcessGroups
from orchestrator.spec.train import TrainSpec

# Compiling this op takes 46 s at the first init, it assumes one host, and gloo is the better choice here.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed_logger.setLevel(logging.WARNING)

WAITING = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor", "all_gather", "all_gather_into_tensor")


def config_of(train: TrainSpec) -> dict[str, Any]:
    """DeepSpeed's config for an engine whose gradients are summed elsewhere."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_allreduce_op": "sum",
        "gradient_clipping": train.gradient_clipping or 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
        "zero_optimization": {
            "stage": train.zero_stage,
            "reduce_scatter": True,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "reduce_bucket_size": 1,  # of DeepSpeed's own reduction, which is not used
        },
    }
    if train.precision == "bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    return config


def set_up(groups: ProcessGroups, device: torch.device) -> None:
    """Register a generation's groups, and count DeepSpeed's own collectives, on this device, as waiting."""
    _register(groups)
    os.environ["LOCAL_RANK"] = "0"  # Ray shows each worker its own devices, so the first is ours
    deepspeed.init_distributed(dist_backend=None, dist_init_required=False, verbose=False)
    _count_waits(deepspeed.comm.comm.cdb, device)


def _register(groups: ProcessGroups) -> None:
    """Register our groups with DeepSpeed, which would make its own by new rendezvous otherwise."""
    unregister()
    registry._WORLD_GROUP = groups.world
    for colour, replicas in enumerate(groups.replicas):
        name = group_name(colour)
        registry._EXPERT_PARALLEL_GROUP[name] = groups.world
        registry._EXPERT_DATA_PARALLEL_GROUP[name] = replicas


def _count_waits(backend: Any, device: torch.device) -> None:
    """Count the time in DeepSpeed's own collectives, gradient reduction above all, as waiting for peers."""
    for name in WAITING:
        collective = getattr(backend, name, None)
        if collective is not None:
            setattr(backend, name, _counted(collective, device))


def _counted(collective: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    @functools.wraps(collective)
    def counted(*args: Any, **kwargs: Any) -> Any:
        with collective_stats.waiting(device):
            return collective(*args, **kwargs)

    return counted


def unregister() -> None:
    """Drop the groups of a generation."""
    for name in dir(registry):
        value = getattr(registry, name)
        if name.startswith("_") and name.isupper() and isinstance(value, dict):
            value.clear()
    registry._WORLD_GROUP = None
    deepspeed.comm.comm.cdb = None
