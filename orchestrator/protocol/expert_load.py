"""Summary of the experts' load in a step."""

from dataclasses import dataclass

Loads = tuple[tuple[int, ...], ...]  # of a step: by MoE layer, tokens of each expert


@dataclass(frozen=True)
class ExpertLoad:
    """Balance of a step's global batch over the experts. All 0 without experts or tokens.

    Args:
        max_violation: MaxVio (arXiv:2408.15664, section 2.1), max load / mean load - 1 of a layer; mean over layers.
        worst_violation: the same for the layer where it is largest.
        worst_layer: that layer, counted from 0 among the MoE layers; -1 without any.
        utilisation: mean load / max load, mean over layers: the share of time that experts would be busy if each had a
            rank of its own.
        dead: share of all layers' experts that no token chose.
        entropy: entropy of the distribution of choices, relative to its maximum, log E; mean over layers.
        swing: share of experts whose load changed from well above the mean to well below it, or back, since the step
            before; None in the first step of a generation.
        dropped: share of the choices that a capacity dropped; None without one.
        rank_violation: largest load of a rank / mean load - 1, over all layers: their largest loads are summed, as a
            layer begins when the one before has ended; None in a world of one.
        num_experts: of each layer.
        per_token: mean number of experts that a token chose; with `top_p`, else None.
    """

    max_violation: float = 0.0
    worst_violation: float = 0.0
    worst_layer: int = -1
    utilisation: float = 0.0
    dead: float = 0.0
    entropy: float = 0.0
    swing: float | None = None
    dropped: float | None = None
    per_token: float | None = None
    rank_violation: float | None = None
    num_experts: int = 0
