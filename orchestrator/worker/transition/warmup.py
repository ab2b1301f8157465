"""Warm-up of a standby: all work that its first fence would otherwise wait for.

Imports, the first engine of the process (1.5 s; later ones take a few hundredths), one step of a tiny model, and a
frozen garbage collector, so that collections don't walk through DeepSpeed's and torch's modules again and again.
"""

import gc
from datetime import timedelta

import torch
from torch._C._distributed_c10d import HashStore

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.engine.deepspeed.engine import DeepSpeedEngineAdapter
from orchestrator.engine.process_groups import backend_of, connect, disconnect
from orchestrator.model.factory import single_rank
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.spec.job import JobSpec


def warm_up(spec: JobSpec, vocab_size: int, device: torch.device, address: str) -> None:
    """Build a small engine of the job's kind in a world of one, do one step, and drop it.

    Args:
        address: where this process can be reached: its first gloo group fixes that for all others.
    """
    sizes = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": spec.model.num_experts_per_tok}
    small = spec.model.model_copy(update=sizes | {"n_group": 1, "topk_group": 1})
    store = HashStore()
    store.set_timeout(timedelta(seconds=30))
    placement = ExpertPlacement.balanced(small.n_routed_experts, 1)
    groups = connect(store, "warm-up", 0, placement, backend_of(device), address=address)
    try:
        with device:
            model = MoELanguageModel(small, vocab_size, single_rank(small))
            tokens_BU = torch.zeros(1, spec.train.sequence_length + 1, dtype=torch.int64)
        model.init_weights(0)
        train = spec.train.model_copy(update={"trainable": ("*",)})  # the job's names may be of no parameter here
        engine = DeepSpeedEngineAdapter(model, train, groups, device, spec.communication)
        engine.on_weights_initialized()
        batch = {"inputs": tokens_BU[:, :-1], "targets": tokens_BU[:, 1:]}
        engine.accumulate(batch, spec.train.sequence_length, last=True)
        engine.step(0.0)
        engine.close()
    finally:
        disconnect()
    del engine, model
    gc.collect()
    gc.freeze()
