"""Traffic between a job's workers in a step, with its own and other compression schemes. Pure."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from orchestrator.elastic.expert_placement import ExpertPlacement, groups_open
from orchestrator.elastic.state_spec import ParamSpec, is_compressed, rank_of_product
from orchestrator.policy.estimate.activations import item_bytes
from orchestrator.policy.health.expert_load import NUM_MARGIN_BINS
from orchestrator.policy.state.config import micro_batch_of
from orchestrator.protocol.usage import Traffic, TrafficKind
from orchestrator.sampling.micro_batches import max_micro_batches, micro_batches_of, split_into_micro_batches
from orchestrator.spec.communication import BLOCK, SPARSE_BYTES, CompressionSpec
from orchestrator.spec.job import JobSpec

VOICES = 7  # numbers that each rank adds to a vote (orchestrator.worker.step.vote)
SCHEMES = ("none", "bf16", "int8", "int4", "topk", "powersgd")  # shown in a plan, beside the job's own


@dataclass(frozen=True)
class TrafficPlan:
    """Bytes sent between workers in one step, of all workers together. Collectives count as in a ring.

    `snapshots` is the bytes that buddies get after a step, divided by the steps between two snapshots.

    `gradients_by_scheme` holds `gradients_reduced` with another `communication.compression`.

    `dispatch` is tokens sent to experts, and their gradients sent back; `combine` is results and their gradients; both
    assume equally likely experts. `control` is counts of tokens and votes.
    """

    gradients_reduced: int
    parameters_gathered: int
    dispatch: int
    combine: int
    control: int
    snapshots: int = 0
    gradients_by_scheme: tuple[tuple[str, int], ...] = ()

    @property
    def total(self) -> int:
        reduced = self.gradients_reduced + self.parameters_gathered
        return reduced + self.dispatch + self.combine + self.control + self.snapshots


def num_micro_batches(job: JobSpec) -> int:
    """Micro-batches of a step whose rows all have the largest length; for fitted sizes, the number at first."""
    lengths_R = np.full(job.train.global_batch_size, job.train.sequence_length)
    return len(split_into_micro_batches(lengths_R, micro_batch_of(job)))


def traffic_of(job: JobSpec, params: Sequence[ParamSpec], placement: ExpertPlacement, snapshots: int) -> TrafficPlan:
    """
    Args:
        params: all parameters of the model.
        snapshots: bytes that buddies get per step.
    """
    size, train, model, micro_batches = placement.world_size, job.train, job.model, num_micro_batches(job)
    moe_layers = len({param.name.partition(".experts.")[0] for param in params if param.expert is not None})
    rows = 0.0  # of a step, per layer, that leave their rank
    destinations = placement.destinations()
    for rank in range(size):
        tokens = (
            len(micro_batches_of(rank, size, micro_batches))
            * train.global_batch_size
            * train.sequence_length
            / micro_batches
        )
        to, limit = destinations[rank], job.communication.ranks_per_token
        if train.is_exact:  # each choice is a row
            rows += tokens * model.num_experts_per_tok * sum(other != rank for other in to) / len(to)
        else:
            rows += tokens * ranks_visited(to, rank, model.num_experts_per_tok, limit)
    again = model.gradient_checkpointing != "none"  # recomputed in the backward pass, so sent again
    sent_rows = round(rows) * moe_layers * (2 + again)
    gates = item_bytes(train) * max(len(placement.experts_of(rank)) for rank in range(size))
    passes = max_micro_batches(size, micro_batches) * (1 + again)
    counts = passes * moe_layers * size * (size - 1) * 8
    margins = NUM_MARGIN_BINS if model.counts_margins else 0
    masses = NUM_MARGIN_BINS if model.router.selection == "top_p" else 0
    vote = (
        2
        * (size - 1)
        * 8
        * (
            micro_batches
            + moe_layers * (model.n_routed_experts * (1 + margins) + masses + 1)
            + VOICES * size
            + len(fields(Traffic)) * len(TrafficKind)
        )
    )
    reductions = (
        max_micro_batches(size, micro_batches) if train.zero_stage == 2 else 1
    )  # stage 2 reduces after every micro-batch
    if train.is_exact:
        reductions *= 2  # of fp64
    compression = job.communication.compression
    others = [CompressionSpec.model_validate({"scheme": scheme, "share": compression.share}) for scheme in SCHEMES]
    params = [param for param in params if train.is_trained(param.name)]
    gathered = sum(p.numel * item_bytes(train) * (_holders(p, placement) - 1) for p in params)
    return TrafficPlan(
        gradients_reduced=reductions * gradient_bytes(params, placement, compression),
        parameters_gathered=gathered,
        dispatch=sent_rows * (_token_bytes(job) + gates),
        combine=sent_rows * _token_bytes(job),
        control=counts + vote,
        snapshots=snapshots,
        gradients_by_scheme=tuple(
            (other.scheme, reductions * gradient_bytes(params, placement, other)) for other in others
        ),
    )


def ranks_visited(destinations: Sequence[int], rank: int, top_k: int, ranks_per_token: int | None = None) -> float:
    """Average number of other ranks that a token of `rank` is sent to, if all choices of experts are equally likely.

    Args:
        destinations: by expert, the rank that the tokens go to.
        ranks_per_token: number of ranks that a token may choose among, all equally likely; None for all.
    """
    experts = Counter(destinations)
    in_reach = groups_open(experts.values(), ranks_per_token or len(experts), top_k) / len(experts)
    pool = max(top_k, round(in_reach * len(destinations)))
    missed = {to: math.comb(max(pool - held, 0), top_k) / math.comb(pool, top_k) for to, held in experts.items()}
    return in_reach * sum(1.0 - share for to, share in missed.items() if to != rank)


def gradient_bytes(params: Sequence[ParamSpec], placement: ExpertPlacement, compression: CompressionSpec) -> int:
    """Bytes that all ranks together send for one reduction of all gradients."""
    size, sent = placement.world_size, 0.0
    for param in params:
        share = sent_share(param, compression, size) if is_compressed(param, compression) else 1.0
        sent += param.numel * 4 * (_holders(param, placement) - 1) * share
    return round(sent)


def sent_share(param: ParamSpec, compression: CompressionSpec, num_ranks: int) -> float:
    """Bytes of a compressed parameter's gradients sent between `num_ranks`, as a share of fp32."""
    scale = 4 / (4 * BLOCK)
    match compression.scheme:
        case "bf16":
            return 0.5
        case "fp16":
            return 0.5 + scale
        case "int8":
            return 0.25 + scale
        case "int4":
            return 0.125 + scale
        case "topk":
            return compression.kept_per_block(num_ranks) * SPARSE_BYTES / (4 * BLOCK)
        case "powersgd":
            rank = rank_of_product(param, compression)
            return 2 * rank * (param.rows + param.numel // param.rows) / param.numel
    return 1.0


def _holders(param: ParamSpec, placement: ExpertPlacement) -> int:
    return placement.world_size if param.expert is None else len(placement.replica_set(param.expert, param.name))


def _token_bytes(job: JobSpec) -> int:
    """Bytes of one token sent to an expert."""
    size, plain = job.model.hidden_size, item_bytes(job.train)
    return {"native": size * plain, "bf16": 2 * size, "int8": size + 4}[job.communication.tokens]
