"""The `experts` section: where a run's experts are, and how many there are at each step."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Literal

from pydantic import Field

from orchestrator.spec.keys.section import Broken, Path, Section

BY_LOAD = "load"
DECIDED_BEFORE = 32  # steps between those that are measured for a shrink and the shrink
LEAST_MEASURED = 32  # steps of a number of experts whose averages decide
OF_PLACEMENT = ("ranks_per_token", "nodes_per_token")  # keys of `communication` by which a choice depends on it


class PlacementSpec(Section):
    """Assignment of the experts of each layer to workers, by the tokens that they get."""

    policy: Literal["manual", "load"] = Field(
        default="manual",
        description="manual: workers have equally many experts, until `orchestrator experts rebalance`. load: experts "
        "move whenever the busiest worker of each layer would get so much less to do that it is worth the stall.",
    )
    num_redundant_experts: int = Field(
        default=0,
        ge=0,
        description="Copies that the experts of a layer may have in all, besides one each. Those with the most tokens "
        "get them, where moving experts is not enough. Each takes the memory of an expert, and its gradients are "
        "summed over the workers that have it.",
    )


class ExpertNumber(Section):
    """Another number of experts."""

    num_experts: int = Field(
        ge=1,
        description="Routed experts of each MoE layer from then on: a multiple of the number before, or fewer, "
        "num_experts_per_tok at least.",
    )
    keep: Literal["reap", "load", "random"] = Field(
        default="reap",
        description="Of fewer experts, those that stay in each layer. reap: those that add most to their tokens, by "
        "the mean of gate * norm of the output lately (arXiv:2510.13999). load: those that got most tokens lately. "
        "random: drawn by train.seed.",
    )
    noise: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Of more experts: standard deviation of what is added to the router's weights of clones, over that "
        "of its weights. 0: the model computes what it did before.",
    )
    reinit_ratio: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Of more experts: share of each clone's inner width that is drawn anew, with the mean and standard "
        "deviation of what it replaces (Drop-Upcycling, arXiv:2502.19261). 0: the model computes what it did before.",
    )
    dissolve: bool = Field(
        default=False,
        description="true: from then on a token may visit several clones of one expert. An export needs that.",
    )


class ScheduledExperts(ExpertNumber):
    """A change of the number of experts at a known step."""

    at_step: int = Field(ge=1, description="The first step (counted from 0) with the new number of experts.")


class ExpertsSpec(Section):
    """The routed experts of a run."""

    placement: PlacementSpec = Field(default=PlacementSpec(), description="Which worker has which experts.")
    schedule: tuple[ScheduledExperts, ...] = Field(
        default=(), description="Changes of the number of experts at known steps, in ascending order."
    )
    saliency: bool = Field(
        default=False,
        description="true: measure how much each expert adds to its tokens, for `orchestrator experts set --keep "
        "reap`; a schedule that needs it measures it anyway. On a GPU experts are not computed in groups then.",
    )

    def broken_rules(self) -> Iterator[Broken]:
        for i, (earlier, later) in enumerate(pairwise(self.schedule), start=1):
            if later.at_step <= earlier.at_step:
                rule = f"at_step must be greater than in the entry before; got {later.at_step} after {earlier.at_step}"
                yield Broken((("schedule", i, "at_step"), ("schedule", i - 1, "at_step")), rule)


def broken_placement(
    placement: PlacementSpec, num_experts: int, most_workers: int, limits: Mapping[str, int | None]
) -> Iterator[Broken]:
    """The rules between the placement of experts and other sections that are broken.

    Args:
        limits: keys of `communication` by which a token's choice depends on the placement, with their values.
    """
    section: Path = ("experts", "placement")
    most = num_experts * (most_workers - 1)
    if placement.num_redundant_experts > most:
        rule = (
            f"num_redundant_experts must be at most {most}, with which each of {most_workers} workers has all "
            f"{num_experts} experts; got {placement.num_redundant_experts}"
        )
        keys: tuple[Path, ...] = (
            (*section, "num_redundant_experts"),
            ("workers", "max"),
            ("model", "n_routed_experts"),
        )
        yield Broken(keys, rule)
    for name, limit in limits.items():
        for key, value in placement.model_dump(exclude_defaults=True).items() if limit is not None else ():
            rule = f"placement.{key} must not be {value} with communication.{name}, by which loads follow the placement"
            yield Broken(((*section, key), ("communication", name)), f"{rule}; got {limit}")


def is_measured(entry: ScheduledExperts, num_before: int) -> bool:
    """Whether a change leaves out experts by what was measured of them."""
    return entry.num_experts < num_before and entry.keep != "random"


def measured_steps(schedule: Sequence[ScheduledExperts], num_experts: int) -> tuple[int, ...]:
    """The steps whose averages decide which experts stay at a scheduled step.

    Args:
        num_experts: of each layer at the start of the run.
    """
    numbers = (num_experts, *(entry.num_experts for entry in schedule))
    entries = zip(schedule, numbers, strict=False)
    return tuple(measured_step(entry.at_step) for entry, before in entries if is_measured(entry, before))


def measured_step(at_step: int) -> int:
    """The step whose averages decide on the experts that stay at `at_step`. Some steps earlier, so that the next
    generation is ready in time, and always the same one, so that a run that is repeated keeps the same experts."""
    return at_step - 1 - DECIDED_BEFORE


def unfit_number(before: int, after: int, top_k: int) -> str:
    """Why a layer can't go from `before` to `after` experts; empty if it can.

    Args:
        top_k: experts that a token visits.
    """
    if after > before and after % before:
        return f"a growth makes equally many clones of each expert, and {after} is no multiple of {before}"
    if after < top_k:
        return f"each token visits {top_k} experts"
    return ""


def broken_schedule(
    schedule: Sequence[ScheduledExperts],
    keys: Sequence[Path],
    num_experts: int,
    top_k: int,
    max_steps: int,
    unfit: Mapping[str, str],
) -> Iterator[Broken]:
    """The rules between changes of the number of experts and other sections that are broken.

    Args:
        keys: of each change; where it has no `at_step`, its step follows from other keys.
        num_experts: at the start of the run.
        top_k: experts that a token visits.
        unfit: keys of `model` with which the number can't change, with the reason.
    """
    before: Path = ("model", "n_routed_experts")
    for i, (entry, here) in enumerate(zip(schedule, keys, strict=True)):
        step, name = ((*here, "at_step"), "at_step") if here[0] == "experts" else (here, "the stage's first step")
        if entry.at_step >= max_steps:
            rule = f"{name} must be less than train.max_steps; got {entry.at_step} and {max_steps}"
            yield Broken((step, ("train", "max_steps")), rule)
        began = schedule[i - 1].at_step if i else 0
        if is_measured(entry, num_experts) and entry.at_step - began < (least := DECIDED_BEFORE + LEAST_MEASURED):
            rule = f"with keep {entry.keep}, {name} must be {least} steps or more after the start or the change before"
            yield Broken((step, (*here, "keep")), f"{rule}; got {entry.at_step} after {began}")
        if why := unfit_number(num_experts, entry.num_experts, top_k):
            rule = f"num_experts can't be {entry.num_experts} after {num_experts}: {why}"
            yield Broken(((*here, "num_experts"), before, ("model", "num_experts_per_tok")), rule)
        num_experts, before = entry.num_experts, (*here, "num_experts")
    for key, why in unfit.items() if schedule else ():
        wrong: tuple[Path, ...] = (keys[0], ("model", *key.split(".")))
        yield Broken(wrong, f"the number of experts must not change with model.{key}: {why}")
