"""The `communication` section: transfer of gradients and tokens between workers."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from orchestrator.spec.keys.section import Broken, Path, Section
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.train import TrainSpec

BUCKET_MB = 25.0  # as in DistributedDataParallel (Li et al., 2020)
BLOCK = 256  # elements that share a scale, or of which top-k sends the largest: an index fits a byte
SPARSE_BYTES = 3  # per element that top-k sends: its index in its block, and its value in bf16
MANY = 1_000_000  # ranks
COARSE = ("int4", "topk", "powersgd", "auto")  # schemes with too much error to do without error feedback


class CompressionSpec(Section):
    """Compression of dense gradients in transit. Norms, biases, routers, small tensors and experts are never
    compressed."""

    scheme: Literal["none", "fp16", "bf16", "int8", "int4", "topk", "powersgd", "auto"] = Field(
        default="none",
        description="none: fp32. fp16, int8 and int4 have a scale for each 256 elements. topk: the largest of each 256 "
        "elements, in bf16. powersgd: two thin matrices with the nearest product (Vogels et al., 2019). auto: none, "
        "bf16, int8 or int4, whichever is fastest in the first steps of a generation.",
    )
    share: float = Field(
        default=0.05,
        gt=0,
        le=0.5,
        description="For topk and powersgd: bytes that each worker sends, indices included, over the fp32 bytes of the "
        "compressed gradients, at any number of workers. PowerSGD sends at least one column.",
    )
    error_feedback: bool = Field(
        default_factory=lambda known: known.get("scheme") in COARSE,
        description="true: a step's compression error is added to the next step's gradients, so nothing is lost for "
        "good. Default: true for int4, topk, powersgd and auto. Takes 4 bytes per dense parameter on each worker.",
    )
    warmup_steps: int = Field(
        default=0,
        ge=0,
        description="For topk: updates in which the share falls geometrically from 0.5 to `share` (Lin et al., 2018).",
    )
    momentum: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="For topk: momentum applied before the selection (momentum correction, Lin et al., 2018), in "
        "place of the optimizer's, whose betas[0] must be 0.",
    )

    @property
    def is_active(self) -> bool:
        return self.scheme != "none"

    @property
    def keeps(self) -> str:
        """State that the scheme keeps between steps, as written in checkpoints; empty if none."""
        kept = ["residual"] * self.error_feedback + ["velocity"] * bool(self.momentum)
        if self.scheme == "powersgd":
            kept.append(f"thin matrices of share {self.share}")
        return f"{self.scheme}: {', '.join(kept)}" if kept else ""

    def kept_per_block(self, num_ranks: int, share: float | None = None) -> int:
        """Elements that topk sends of each block: fewer with more ranks, since a rank doesn't send its own piece.

        Args:
            share: of bytes; None for the job's share.
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
            keys: tuple[Path, ...] = (("momentum",), ("error_feedback",), ("scheme",))  # its default depends on scheme
            yield Broken(keys, "momentum needs error_feedback; got false")
        if self.error_feedback and not self.is_active:
            yield Broken((("error_feedback",), ("scheme",)), "error_feedback needs a scheme; got none")


def _compression(value: Any) -> Any:
    """Expand the short form: the name of a scheme."""
    return {"scheme": value} if isinstance(value, str) else value


Compression = Annotated[CompressionSpec, BeforeValidator(_compression, json_schema_input_type=str | CompressionSpec)]


class CommunicationSpec(Section):
    """Transfer of gradients and tokens between workers, and its overlap with computation."""

    bucket_mb: float = Field(
        default=BUCKET_MB,
        gt=0,
        le=4096,
        description="Largest size, in MiB of fp32, of gradients that are summed over the workers together. Smaller "
        "buckets are sent sooner, larger ones have less overhead.",
    )
    overlap: bool = Field(
        default=True,
        description="true: complete buckets are sent while the backward pass computes the next ones. false: they "
        "wait for its end; the result has the same bits.",
    )
    tokens: Literal["native", "bf16", "int8"] = Field(
        default="native",
        description="Encoding of tokens sent to experts on other workers, of their results, and of both gradients. "
        "native: the number format of the computation. int8 has a scale for each token.",
    )
    ranks_per_token: int | None = Field(
        default=None,
        ge=1,
        description="Workers whose experts a token may visit: the best ones for it, more if needed to hold "
        "num_experts_per_tok experts. null: all. The choice then depends on the placement of experts, so on the number "
        "of workers too.",
    )
    nodes_per_token: int | None = Field(
        default=None, ge=1, description="The same for nodes, whose workers' experts a token may visit."
    )
    compression: Compression = Field(
        default=CompressionSpec(), description="How dense gradients are compressed: a scheme, or a mapping."
    )


def broken_communication(communication: CommunicationSpec, train: TrainSpec, model: ModelSpec) -> Iterator[Broken]:
    """Rules between what is sent, the optimizer, and the model."""
    momentum = communication.compression.momentum
    if momentum and (train.optimizer.has_momentum or train.zero_stage != 1):
        of: Path = ("communication", "compression", "momentum")
        rule = "momentum of compression takes the place of the optimizer's, once per step: it needs one without, "
        rule += "adamw with betas[0] 0 or sgd with momentum 0, and zero_stage 1; "
        optimizer = train.optimizer
        got = f"got {optimizer.name} with betas[0] {optimizer.betas[0]}, momentum {optimizer.momentum}, and "
        keys: tuple[Path, ...] = (of, ("train", "optimizer", "betas"), ("train", "zero_stage"))
        yield Broken(keys, f"{rule}{got}{train.zero_stage}")
    for key in ("ranks_per_token", "nodes_per_token"):
        if getattr(communication, key) is not None and model.n_group > 1:
            rule = f"{key} and n_group both limit what a token may visit: leave one out; got "
            got = f"{getattr(communication, key)} and {model.n_group}"
            yield Broken((("communication", key), ("model", "n_group")), rule + got)
        if getattr(communication, key) is not None and model.router.selection != "top_k":
            rule = f"{key} limits the choice of top_k only: leave it out, or model.router.selection; got "
            got = f"{getattr(communication, key)} and {model.router.selection}"
            yield Broken((("communication", key), ("model", "router", "selection")), rule + got)
        if getattr(communication, key) is not None and model.impl == "transformers":
            rule = f"{key} limits routers of ours, and with impl: transformers they are its own: leave it out; got "
            yield Broken((("communication", key), ("model", "impl")), f"{rule}{getattr(communication, key)}")
