"""Floating-point operations of a model's training, by formula. Pure.

Of a step: 6 x active parameters x tokens, 2 for the forward and 4 for the backward pass (Kaplan et al. 2020, "Scaling
Laws for Neural Language Models", section 2.1). Active is what a token is multiplied with: all dense parameters and
top_k of the routed experts; our input embedding is a look-up and left out. Attention's scores and sums, which grow with
the length of a row, are told apart: 12 x layers x heads x head size x length per token (Chowdhery et al. 2022, "PaLM",
appendix B), counted as if nothing were masked. What is computed twice to save memory isn't counted.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from orchestrator.elastic.param_spec import ParamSpec
from orchestrator.protocol.messages import StepRecord
from orchestrator.spec.job import JobSpec

INPUT_EMBEDDING = "embedding.weight"  # of our own model


@dataclass(frozen=True)
class ModelSize:
    """What the formulas need to know.

    Args:
        active_parameters: that a token is multiplied with.
        attention: layers x heads x head size; None for a model of the user's own, whose layers we don't know.
        length: tokens of a row where a step's record doesn't say.
    """

    parameters: int
    active_parameters: float
    attention: int | None
    length: int


@dataclass(frozen=True)
class Flops:
    """Of all steps that count. `attention` is None where it isn't known; it is not in `parameters`."""

    active_parameters: float
    parameters: float
    attention: float | None


def size_of(job: JobSpec, params: Sequence[ParamSpec]) -> ModelSize:
    """The job's model, from the list of its parameters."""
    spec, ours = job.model, job.model.entrypoint is None
    share = spec.top_k / spec.num_experts
    multiplied = [param for param in params if not (ours and param.name == INPUT_EMBEDDING)]
    return ModelSize(
        parameters=sum(param.numel for param in params),
        active_parameters=sum(p.numel * (share if p.expert is not None else 1.0) for p in multiplied),
        attention=spec.num_layers * spec.num_heads * spec.head_size if ours else None,
        length=job.train.sequence_length,
    )


def flops_of(size: ModelSize, steps: Iterable[StepRecord]) -> Flops:
    """Of these steps. Where rows are documents, as if all were as long as the longest."""
    known = list(steps)
    token_lengths = sum(record.tokens * (record.sequence_length or size.length) for record in known)
    return Flops(
        active_parameters=size.active_parameters,
        parameters=6.0 * size.active_parameters * sum(record.tokens for record in known),
        attention=None if size.attention is None else 12.0 * size.attention * token_lengths,
    )
