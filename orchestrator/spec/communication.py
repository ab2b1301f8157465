"""The `communication` section: how gradients and tokens travel between workers."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from orchestrator.spec.section import Broken, Path, Section

BUCKET_MB = 25.0  # as in DistributedDataParallel (Li et al., 2020)
BLOCK = 256  # elements that share a scale, or of which the largest are sent: their numbers fit a byte
SPARSE_BYTES = 3  # of an element that top-k sends: its number in its block, and its value in bf16
MANY = 1_000_000  # ranks
COARSE = ("int4", "topk", "powersgd", "auto")  # schemes that lose too much to do without error feedback


class CompressionSpec(Section):
    """What dense gradients are turned into before they travel. Norms, biases, routers and small tensors never are, nor
    are gradients of experts."""

    scheme: Literal["none", "fp16", "bf16", "int8", "int4", "topk", "powersgd", "auto"] = Field(
        default="none",
        description="none: fp32. fp16, int8 and int4 have a scale for each 256 elements. topk: of each 256 elements "
        "the largest, in bf16. powersgd: two thin matrices whose product is nearest (Vogels et al., 2019). auto: none, "
        "bf16, int8 or int4, whichever the first steps of a generation show to be fastest.",
    )
    share: float = Field(
        default=0.05,
        gt=0,
        le=0.5,
        description="For topk and powersgd: bytes that each worker sends, indices included, over those of what is "
        "compressed in fp32, at any number of workers. PowerSGD sends one column at least.",
    )
    error_feedback: bool = Field(
        default_factory=lambda known: known.get("scheme") in COARSE,
        description="true: what a step didn't send is added to the next step's gradients, so nothing is lost for good. "
        "Default: true for int4, topk, powersgd and auto. Takes 4 bytes per dense parameter on each worker.",
    )
    warmup_steps: int = Field(
        default=0,
        ge=0,
        description="For topk: updates in which the share falls, by one factor each, from 0.5 to `share` (Lin et al., "
        "2018).",
    )
    momentum: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="For topk: momentum that is gathered before the choice (momentum correction, Lin et al., 2018), in "
        "place of the optimizer's, whose betas[0] must be 0.",
    )

    @property
    def is_active(self) -> bool:
        return self.scheme != "none"

    @property
    def keeps(self) -> str:
        """What it keeps from step to step, as checkpoints say it; empty if nothing."""
        kept = ["residual"] * self.error_feedback + ["velocity"] * bool(self.momentum)
        if self.scheme == "powersgd":
            kept.append(f"thin matrices of share {self.share}")
        return f"{self.scheme}: {', '.join(kept)}" if kept else ""

    def kept_per_block(self, num_ranks: int, share: float | None = None) -> int:
        """Elements that topk sends of each block: fewer the more ranks there are, since a piece of its own is what a
        rank doesn't send.

        Args:
            share: of bytes; None for what was asked for.
        """
        density = (share or self.share) * 4 / SPARSE_BYTES * num_ranks / max(num_ranks - 1, 1)
        return min(BLOCK, int(density * BLOCK))

    def broken_rules(self) -> Iterator[Broken]:
        if self.scheme == "topk" and not self.kept_per_block(MANY):
            least = SPARSE_BYTES / (4 * BLOCK)
            rule = f"share must leave one of {BLOCK} elements, {least:.5f} at least; got {self.share}"
            yield Broken((("share",), ("scheme",)), rule)
        for key in ("warmup_steps", "momentum"):
            if getattr(self, key) and self.scheme != "topk":
                rule = f"{key} is for scheme topk alone; got {getattr(self, key)} and {self.scheme}"
                yield Broken(((key,), ("scheme",)), rule)
        if self.momentum and not self.error_feedback:
            keys: tuple[Path, ...] = (("momentum",), ("error_feedback",), ("scheme",))  # whose default follows from it
            yield Broken(keys, "momentum needs error_feedback; got false")
        if self.error_feedback and not self.is_active:
            yield Broken((("error_feedback",), ("scheme",)), "error_feedback needs a scheme; got none")


def _compression(value: Any) -> Any:
    """Reads the short form: the name of a scheme."""
    return {"scheme": value} if isinstance(value, str) else value


Compression = Annotated[CompressionSpec, BeforeValidator(_compression, json_schema_input_type=str | CompressionSpec)]


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
    tokens: Literal["exact", "bf16", "int8"] = Field(
        default="exact",
        description="How tokens travel to experts on other workers, results back, and their gradients. exact: in the "
        "number format that they are computed in. int8 has a scale for each token.",
    )
    ranks_per_token: int | None = Field(
        default=None,
        ge=1,
        description="Workers whose experts a token may visit: the best ones for it, and as many as hold top_k experts. "
        "null: all. What is chosen then depends on where experts lie, so on the number of workers too.",
    )
    nodes_per_token: int | None = Field(
        default=None, ge=1, description="The same for nodes, whose workers' experts a token may visit."
    )
    compression: Compression = Field(
        default=CompressionSpec(), description="How dense gradients are compressed: a scheme, or a mapping."
    )
