"""The `verify` section: whether a run's steps are done again while it trains, and compared."""

from pydantic import Field

from orchestrator.spec.section import Section


class VerifySpec(Section):
    """Finding results that hardware has changed. For runs with train.determinism exact."""

    every: int | None = Field(
        default=None,
        ge=1,
        description="A standby does some of the run's steps again, after its newest checkpoint, so many steps after it "
        "last began to, and compares what they led to. And each worker looks in every step whether its state is as it "
        "left it. Needs a standby, with memory for the whole state, and checkpoints. null: neither.",
    )
    steps: int = Field(
        default=8, ge=1, le=256, description="How many steps are done again each time: fewer than checkpoint.every."
    )
