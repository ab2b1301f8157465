"""Changes of the number of experts while they train, and the experts that are there between two changes. Pure.

Growth makes clones: each expert becomes several with the same weights, moments and router rows, which are a *family*. A
token may visit one member of a family at most, the best, so right after the growth the model computes what it did
before. Then each member learns from the tokens that prefer it. Shrinking leaves experts out and ends families: of
families of unequal sizes the only member of one might have to take every token.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

OfLayers = tuple[tuple[int, ...], ...]
"""A number for each expert, by MoE layer in the model's order; a single entry holds for all layers."""


def of_layer(values: OfLayers, layer: int) -> tuple[int, ...]:
    """The numbers of one layer's experts."""
    return values[layer if len(values) > 1 else 0]


@dataclass(frozen=True)
class ExpertChange:
    """A change of the number of experts.

    Args:
        first_step: with the new number; -1 until it is known.
        num_before: experts of each layer before it.
        sources: of each new expert, the old one that it comes from.
        dissolves: families end.
        noise, reinit_ratio: what is changed of clones, as in the job (`spec.moe.experts.ScheduledExperts`).
        request: number of the request that it answers; 0: it was scheduled.
    """

    first_step: int
    num_before: int
    sources: OfLayers
    dissolves: bool = False
    noise: float = 0.0
    reinit_ratio: float = 0.0
    request: int = 0

    @property
    def num_experts(self) -> int:
        """Experts of each layer after it."""
        return len(self.sources[0])

    @property
    def is_exact(self) -> bool:
        """Whether weights are moved as they are."""
        return not (self.noise or self.reinit_ratio)


@dataclass(frozen=True)
class ExpertSet:
    """The routed experts of each MoE layer in some steps.

    Args:
        families: the family of each expert; empty where each is one of its own.
    """

    num_experts: int
    families: OfLayers = ()

    def after(self, change: ExpertChange) -> "ExpertSet":
        """The experts after a change."""
        if change.dissolves or change.num_experts < self.num_experts:
            return ExpertSet(change.num_experts)
        num_layers = max(len(self.families), len(change.sources))
        own = tuple(range(self.num_experts))
        families = []
        for layer in range(num_layers):
            before = of_layer(self.families, layer) if self.families else own
            families.append(tuple(before[source] for source in of_layer(change.sources, layer)))
        return ExpertSet(change.num_experts, tuple(families[:1]) if len({*families}) == 1 else tuple(families))

    def families_by_name(self, layers: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """The families of each layer, where there are some.

        Args:
            layers: names of the MoE layers.
        """
        named = enumerate(layers) if self.families else ()
        return {layer: of_layer(self.families, number) for number, layer in named}


def set_at(num_experts: int, changes: Iterable[ExpertChange], step: int) -> ExpertSet:
    """The experts that do a step.

    Args:
        num_experts: of each layer at the start of the run.
        changes: all that are decided, in the order of their steps.
    """
    found = ExpertSet(num_experts)
    for change in changes:
        if 0 <= change.first_step <= step:
            found = found.after(change)
    return found


def cloned(before: int, after: int) -> OfLayers:
    """Sources of a growth: expert `e` becomes `e`, `e + before`, `e + 2 * before`, and so on."""
    return (tuple(expert % before for expert in range(after)),)


def kept(scores: Sequence[Sequence[float]], after: int) -> OfLayers:
    """Sources of a shrink: the experts with the highest scores stay, in their order; of equal ones the first.

    Args:
        scores: of each expert, by MoE layer.
    """
    found = []
    for of_experts in scores:
        ranked = sorted(range(len(of_experts)), key=lambda expert: (-of_experts[expert], expert))
        found.append(tuple(sorted(ranked[:after])))
    return tuple(found[:1]) if len({*found}) == 1 else tuple(found)


def at(change: ExpertChange, first_step: int) -> ExpertChange:
    """The change, which begins with this step."""
    return replace(change, first_step=first_step)
