"""Floating-point operations of a model's training, by formula. Pure.

Of a step: 6 x active parameters x tokens, 2 for the forward and 4 for the backward pass (Kaplan et al. 2020, "Scaling
Laws for Neural Language Models", section 2.1). Active parameters are those that a token is multiplied with: all dense
ones and top_k of the routed experts; our input embedding is a look-up and left out, and the output matrix counts once
more for each exit. Attention's scores and sums, which
grow with the row length, are separate: 12 x layers x heads x head size x length per token (Chowdhery et al. 2022,
"PaLM", appendix B), counted as if nothing were masked. Recomputation to save memory isn't counted.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from orchestrator.elastic.state_spec import ParamSpec
from orchestrator.protocol.step_record import StepRecord
from orchestrator.spec.job import JobSpec

INPUT_EMBEDDING, OUTPUT_MATRIX = "embedding.weight", "head"  # of our own model


@dataclass(frozen=True)
class ModelSize:
    """Inputs of the formulas.

    Args:
        active_parameters: those that a token is multiplied with.
        attention: layers x heads x head size; None for a user's own model, whose layers are unknown.
        length: tokens of a row, for steps whose record lacks it.
    """

    parameters: int
    active_parameters: float
    attention: int | None
    length: int


@dataclass(frozen=True)
class Flops:
    """Operations of all steps that count. `attention` is None if unknown, and not included in `parameters`."""

    active_parameters: float
    parameters: float
    attention: float | None


def size_of(job: JobSpec, params: Sequence[ParamSpec]) -> ModelSize:
    """The size of the job's model, from the list of its parameters."""
    spec, ours = job.model, job.model.is_native
    share = spec.num_experts_per_tok / spec.n_routed_experts
    num_exits = 0 if spec.exits is None else len(spec.exits.layers)
    multiplied = [param for param in params if not (ours and param.name == INPUT_EMBEDDING)]
    multiplied += [param for param in params if ours and param.name == OUTPUT_MATRIX] * num_exits
    return ModelSize(
        parameters=sum(param.numel for param in params),
        active_parameters=sum(p.numel * (share if p.expert is not None else 1.0) for p in multiplied),
        attention=spec.num_hidden_layers * spec.num_attention_heads * (spec.key_dim + spec.value_dim) // 2
        if ours
        else None,
        length=job.train.sequence_length,
    )


def flops_of(size: ModelSize, steps: Iterable[StepRecord]) -> Flops:
    """Operations of these steps. Where rows are documents, all count as long as the longest."""
    known = list(steps)
    token_lengths = sum(record.batch.tokens * (record.batch.sequence_length or size.length) for record in known)
    return Flops(
        active_parameters=size.active_parameters,
        parameters=6.0 * size.active_parameters * sum(record.batch.tokens for record in known),
        attention=None if size.attention is None else 12.0 * size.attention * token_lengths,
    )
