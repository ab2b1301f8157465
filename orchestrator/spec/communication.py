"""The `communication` section: how gradients and tokens travel between workers."""

from pydantic import Field

from orchestrator.spec.section import Section

BUCKET_MB = 25.0  # as in DistributedDataParallel (Li et al., 2020)


class CommunicationSpec(Section):
    """What travels between workers in a step, and when."""

    bucket_mb: float = Field(
        default=BUCKET_MB,
        gt=0,
        le=4096,
        description="MiB of fp32 gradients that are summed over the workers together, at most. Smaller ones are under "
        "way sooner, larger ones cost less each.",
    )
    overlap: bool = Field(
        default=True,
        description="true: a bucket's gradients travel while the backward pass computes the next ones. false: they "
        "wait for its end; the result has the same bits.",
    )
