"""A model whose matrices are integers, for evaluation and generation.

Embeddings and the output matrix are int8 with a scale per row, in any such model.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from orchestrator.errors import UsageError
from orchestrator.inference.int_matrix import IntEmbedding, IntMatrix
from orchestrator.model.base import TrainableModel
from orchestrator.model.linear.integers import rounded
from orchestrator.model.linear.products import LinearProducts
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.spec.job import JobSpec
from orchestrator.spec.quantization import NUM_BITS, QuantizationSpec

GROUP_SIZE = 32  # of four-bit weights of runs that weren't trained for them, where it divides all rows


def matrices_of(model: nn.Module) -> Iterator[tuple[str, LinearProducts, str, nn.Parameter]]:
    """Every matrix of linear products: its name, its module, its name there, and the parameter."""
    for prefix, module in model.named_modules():
        if isinstance(module, LinearProducts):
            for name, param in module.named_parameters(recurse=False):
                if param.ndim == 2:
                    yield f"{prefix}.{name}", module, name, param


def refuse_integers(job: JobSpec, dtype: str, unchanged: str = "") -> None:
    """Raise UsageError if a run's model isn't ours, or was trained for other integers.

    Args:
        dtype: int8 or int4.
    """
    trained, wrong = job.train.quantization, ""
    if not job.model.is_native:
        wrong, remedy = (
            f"{dtype} is for our own model, and run {job.name} has one of {job.model.origin}",
            "Choose fp32.",
        )
    elif trained is not None and trained.weight_dtype != dtype:
        wrong = f"run {job.name} was trained for {trained.weight_dtype} (train.quantization), and {dtype} is asked for"
        remedy = f"Choose {trained.weight_dtype}, fp32 or bf16."
    if wrong:
        raise UsageError(wrong, remedy=remedy, unchanged=unchanged)


def formats_of(job: JobSpec, model: TrainableModel, dtype: str) -> QuantizationSpec:
    """The formats of a run's model: those that it was trained for, or with int8 all of its matrices with a scale per
    row, with int4 with one per 32 weights where that divides all rows.

    Args:
        dtype: int8 or int4.

    Raises:
        UsageError: as `refuse_integers`.
    """
    refuse_integers(job, dtype)
    if job.train.quantization is not None:
        return job.train.quantization
    is_divided = all(param.shape[1] % GROUP_SIZE == 0 for *_, param in matrices_of(model))
    size = GROUP_SIZE if NUM_BITS[dtype] == 4 and is_divided else None
    return QuantizationSpec.model_validate({"weight_dtype": dtype, "group_size": size})


@torch.no_grad()
def as_rounded_in_training(model: nn.Module, job: JobSpec) -> None:
    """Round a model's fp32 weights to bf16 where they were trained for integers so: else an integer may be the next."""
    if job.train.quantization is not None and job.train.precision == "bf16":
        for param in model.parameters():
            param.copy_(param.bfloat16())


@torch.no_grad()
def use_integers(model: MoELanguageModel, formats: QuantizationSpec) -> None:
    """Put integers in the place of the model's matrices, embeddings and output matrix. Its adapters are merged. The
    model can't be trained or saved any more."""
    input_bits = None if formats.activation_dtype is None else NUM_BITS[formats.activation_dtype]
    for full_name, module, name, param in list(matrices_of(model)):
        if formats.has(full_name, param.shape):
            adapter = module.adapters.get(name)
            whole = param if adapter is None else adapter.merged(param)
            matrix = IntMatrix(whole.detach(), formats.num_bits, formats.group_size, input_bits)
            module.quantized = {**module.quantized, name: matrix}
            module.adapters = {each: kept for each, kept in module.adapters.items() if each != name}
            setattr(module, name, None)
    head = IntMatrix(model.head.detach(), 8, None, input_bits)
    model.head_product = head
    if input_bits is not None:
        model.head_inputs = partial(rounded, num_bits=input_bits)
    model.head.data = rounded(model.head.detach(), 8)
    model.embedding = IntEmbedding(model.embedding.weight.detach())  # type: ignore[assignment]
