"""The `checkpoint` section: durable copies of the training state."""

from pydantic import Field

from orchestrator.spec.section import Section


class CheckpointSpec(Section):
    """Durable copies of the training state. One after the last step is always written."""

    every: int | None = Field(
        default=None, ge=1, description="Steps between two checkpoints. null: only the final one."
    )
    keep_last: int | None = Field(
        default=None, ge=1, description="How many of the newest checkpoints are kept. null: all."
    )
    keep_best: int = Field(
        default=0,
        ge=0,
        description="How many more are kept for their validation loss, the lowest ones. Needs eval.every.",
    )
