"""The `experts` section: where a run's experts are."""

from collections.abc import Iterator, Mapping
from typing import Literal

from pydantic import Field

from orchestrator.spec.keys.section import Broken, Path, Section

BY_LOAD = "load"
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


class ExpertsSpec(Section):
    """The routed experts of a run."""

    placement: PlacementSpec = Field(default=PlacementSpec(), description="Which worker has which experts.")


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
