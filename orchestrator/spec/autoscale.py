"""The `autoscale` section: how the number of workers changes by itself."""

from typing import Literal

from pydantic import Field

from orchestrator.spec.section import Section

Policy = Literal["manual", "available", "stage", "throughput"]
MANUAL: Policy = "manual"
AVAILABLE: Policy = "available"
STAGE: Policy = "stage"
THROUGHPUT: Policy = "throughput"


class AutoscaleSpec(Section):
    """Who decides how many workers a run has, within `workers.min` and `max` and what its stage names."""

    policy: Policy = Field(
        default=MANUAL,
        description="manual: you, by `orchestrator scale` and workers.schedule. available: as many as the cluster has "
        "room for. stage: as many as the stage names, and Ray's autoscaler is asked for nodes for the most of them. "
        "throughput: one more at a time, as long as it adds enough; Ray's autoscaler is asked for nodes.",
    )
    cooldown_s: float = Field(
        default=30.0, ge=0, description="Seconds between two changes of its own that add workers."
    )
    min_gain: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="throughput: what a further worker has to add, as a share of what each had done before. It goes "
        "again if it adds less.",
    )
