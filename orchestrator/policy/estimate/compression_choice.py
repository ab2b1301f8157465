"""Choice of the compression scheme with the fastest step, from measurements of the first steps. Pure.

A step sends gradients while it computes: it waits only for those that don't fit into the backward pass. The time of
coding is not hidden where it needs the same processor.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.elastic.state_spec import ParamSpec
from orchestrator.policy.estimate.traffic import sent_share
from orchestrator.spec.communication import CompressionSpec

CANDIDATES = ("none", "bf16", "int8", "int4")  # by increasing error; all continue from the same kept state
WORTH = 0.02  # a coarser scheme must save this share of a step


@dataclass(frozen=True)
class Measured:
    """Measurements of a rank, in seconds and bytes of one step.

    Args:
        step_s: a step without its waits for gradients.
        backward_s: of it, the last micro-batch's backward pass.
        num_buckets: buckets in which gradients are sent.
        gradient_bytes: gradients in fp32 that this rank sends.
        bytes_per_s: rate of the link for gradients while nothing is computed.
        coding_s: by scheme, time to encode and decode a step's gradients.
    """

    step_s: float
    backward_s: float
    num_buckets: int
    gradient_bytes: int
    bytes_per_s: float
    coding_s: Mapping[str, float]


def predicted_step_s(measured: Measured, scheme: str) -> float:
    """Predicted time of a step. The last bucket is sent when the backward pass is over."""
    share = sent_share(ANY, CompressionSpec.model_validate({"scheme": scheme}), MANY) if scheme != "none" else 1.0
    sending_s = measured.gradient_bytes * share / measured.bytes_per_s
    last_s = sending_s / measured.num_buckets
    hidden_s = measured.backward_s * (1 - 1 / measured.num_buckets)
    waited_s = last_s + max(0.0, sending_s - last_s - hidden_s)
    return measured.step_s + measured.coding_s.get(scheme, 0.0) + waited_s


def choose(measured: Measured) -> str:
    """The least lossy scheme that is nearly as fast as the fastest."""
    seconds = {scheme: predicted_step_s(measured, scheme) for scheme in CANDIDATES}
    best = min(seconds.values())
    return next(scheme for scheme, predicted in seconds.items() if predicted <= best * (1 + WORTH))


ANY, MANY = ParamSpec("any", (256, 256), None), 1 << 20
