"""Warm-up of a standby: all work that its first fence would otherwise wait for.

Imports, the first engine of the process (1.5 s; later ones take a few hundredths), one step of a tiny model, which
compiles parts of it if the job wants that, and a frozen garbage collector, so that collections don't walk through
DeepSpeed's and torch's modules again and again.
"""

import gc
from datetime import timedelta

import torch
from torch._C._distributed_c10d import HashStore

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.engine.deepspeed.engine import DeepSpeedEngineAdapter
from orchestrator.engine.numerics import fingerprint
from orchestrator.engine.process_groups import backend_of, connect, disconnect
from orchestrator.model.compiled import compiler_of, keep_code_apart, try_compiler
from orchestrator.model.factory import single_rank
from orchestrator.model.task import Batch
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.spec.data import BY_DOCUMENT
from orchestrator.spec.job import JobSpec
from orchestrator.spec.task import TEXT


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
        row_counts = [1]
        if spec.train.torch_compile:  # code for single rows is compiled apart
            row_counts = [spec.train.micro_batch_rows or 2, *([1] if spec.train.micro_batch_rows != 1 else [])]
        with device:
            model = MoELanguageModel(small, vocab_size, single_rank(small))
            batches = [_batch(spec, rows) for rows in row_counts]
        model.init_weights(0)
        train = spec.train.model_copy(update={"trainable": ("*",)})  # the job's names may be of no parameter here
        engine = DeepSpeedEngineAdapter(model, train, groups, device, spec.communication)
        engine.on_weights_initialized()
        for number, batch in enumerate(batches):
            engine.accumulate(batch, batch["targets"].numel(), last=number == len(batches) - 1)
        engine.step(0.0)
        for batch in batches if spec.train.torch_compile else ():  # the last one of a validation may have a single row
            engine.evaluate(batch)
        engine.close()
    finally:
        disconnect()
    del engine, model
    gc.collect()
    gc.freeze()


def _batch(spec: JobSpec, rows: int) -> Batch:
    """A micro-batch of rows as those of the job: of equal length, or not."""
    length = spec.train.sequence_length
    tokens_BU = torch.zeros(rows, length + 1, dtype=torch.int64)
    batch = {"inputs": tokens_BU[:, :-1], "targets": tokens_BU[:, 1:]}
    if spec.train.torch_compile and _has_lengths(spec):
        batch["lengths"] = torch.tensor([length - row % 2 for row in range(rows)]).clamp_min_(1)
    return batch


def use_compiler(spec: JobSpec, device: torch.device) -> str:
    """Have this process compile for a job. Returns the compiler, for the fingerprint.

    Raises:
        UsageError: it can't compile.
    """
    train, found = spec.train, compiler_of(device)
    shapes = train.micro_batch_size, train.sequence_length, _has_lengths(spec)
    keep_code_apart(fingerprint(device, compiler=found), train.determinism, shapes)
    try_compiler(device)
    return found


def _has_lengths(spec: JobSpec) -> bool:
    """Whether rows differ in length."""
    return spec.data_format != TEXT or spec.data.row_format == BY_DOCUMENT
