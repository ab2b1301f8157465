"""The `train` section: the updates of a run and their number."""

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from orchestrator.spec.keys.section import Broken, Section, refuse
from orchestrator.spec.optimizer import EmaSpec, LrSchedulerSpec, OptimizerSpec
from orchestrator.spec.pruning import HEADS, PruningSpec
from orchestrator.spec.quantization import QuantizationSpec

# -- The `micro_batch_size` key: the size of one forward and backward pass of a worker ---------------------------------

AUTO = "auto"
RULE = 'must be a number of rows, at least 1, "N tokens" or auto'


def _micro_batch(value: Any) -> Any:
    if value == AUTO or (isinstance(value, str) and re.fullmatch(r"[1-9]\d{0,8} tokens", value)):
        return value
    if type(value) is not int or value < 1:
        raise refuse(RULE)
    return value


MicroBatchSetting = Annotated[int | str, BeforeValidator(_micro_batch, json_schema_input_type=int | str)]


def tokens_of(micro_batch: int | str) -> int | None:
    """N of "N tokens"; None for other forms."""
    number, _, unit = str(micro_batch).partition(" ")
    return int(number) if unit else None


# -- The `train` section: the updates of a run and their number --------------------------------------------------------


class TrainSpec(Section):
    """The training. Nothing here depends on the number of workers."""

    max_steps: int = Field(default=1000, ge=1, description="Updates in the whole run.")
    global_batch_size: int = Field(default=16, ge=1, description="Rows of an update, over all workers.")
    micro_batch_size: MicroBatchSetting = Field(
        default=4,
        description="Size of a micro-batch, one forward and backward pass of one worker: a number of rows, which "
        'divides global_batch_size; "N tokens": as many rows of similar length as make N tokens when padded to '
        "the longest; auto: as many tokens as fit the worker's memory, found by measuring.",
    )
    sequence_length: int = Field(
        default=128, ge=1, description="Tokens of a row; with data.row_format: documents, of the longest row."
    )
    trainable: tuple[str, ...] = Field(
        default=("*",),
        min_length=1,
        description="Patterns of the names of the parameters that are trained (fnmatch). All others stay as they are: "
        'they have no gradients and no optimizer state, and steps send nothing of them. Default: "*"; with model.lora '
        '"*.lora.*", the adapters, and what is named must have them.',
    )
    optimizer: OptimizerSpec = Field(default=OptimizerSpec(), description="The optimizer.")
    lr: float = Field(default=3e-4, gt=0, description="Learning rate at its highest.")
    lr_scheduler: LrSchedulerSpec = Field(default=LrSchedulerSpec(), description="The learning rate over the steps.")
    ema: EmaSpec | None = Field(
        default=None,
        description="An average of the weights over the updates, kept beside them: `model export --weights ema`. null: "
        "none.",
    )
    pruning: PruningSpec | None = Field(
        default=None, description="Weights that become zero while the run trains (docs/pruning.md). null: none."
    )
    quantization: QuantizationSpec | None = Field(
        default=None,
        description="Training with the rounding of integer weights and inputs, for an export in integers "
        "(docs/quantization.md). null: without.",
    )
    gradient_clipping: float = Field(
        default=1.0, ge=0, description="Largest global norm of the gradients. 0: no clipping."
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of initial weights and of the order of rows.")
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="Number format of forward and backward. Weights that are trained are kept in fp32 with either.",
    )
    float8: bool = Field(
        default=False,
        description="true: linear products of attention, MLPs and experts are computed in float8, forward and "
        "backward, with a scale per matrix; routers, norms, embedding and head are not. Needs GPUs of compute "
        "capability 8.9 or later (docs/gpus.md), and our own model.",
    )
    torch_compile: bool = Field(
        default=False,
        description="true: norms, products of attention and of dense MLPs, and what is around them, are compiled by "
        "torch.compile while a worker warms up (docs/compiling.md). Needs a C++ compiler on each node, and our own "
        "model.",
    )
    zero_stage: Literal[1, 2] = Field(
        default=1, description="State partitioned over the workers: 1 optimizer state, 2 gradients as well."
    )

    determinism: Literal["fast", "exact"] = Field(
        default="fast",
        description="exact: the same job ends with the same bits whatever happens to its workers and however many "
        "they are, on the same kind of processor with the same versions and threads; takes longer. fast: rounding may "
        "differ.",
    )

    @property
    def names_parameters(self) -> bool:
        """Whether there are patterns of parameters, which the model's must fit."""
        changed = self.pruning is not None or self.quantization is not None
        return bool(self.optimizer.groups) or self.trainable != ("*",) or changed

    def is_trained(self, name: str) -> bool:
        """Whether the parameter of this name is trained."""
        return any(fnmatchcase(name, pattern) for pattern in self.trainable)

    @property
    def prunes_units(self) -> bool:
        """Whether whole neurons or heads are pruned."""
        return self.pruning is not None and any(target.is_structured for target in self.pruning.targets)

    @property
    def prunes_heads(self) -> bool:
        """Whether attention heads are pruned."""
        return self.pruning is not None and any(target.pattern == HEADS for target in self.pruning.targets)

    @property
    def is_exact(self) -> bool:
        return self.determinism == "exact"

    @property
    def has_masters(self) -> bool:
        """Whether fp32 weights are state beside those of the model: these are rounded, or an average follows updates,
        which a replay makes from the part of the state that only one rank has."""
        return self.precision == "bf16" or self.ema is not None

    @property
    def most_micro_batches(self) -> int:
        """Largest number of micro-batches in a step, each with at least one row."""
        return self.global_batch_size // (self.micro_batch_rows or 1)

    @property
    def micro_batch_rows(self) -> int:
        """Rows of a micro-batch; 0 where it is measured in tokens."""
        return self.micro_batch_size if isinstance(self.micro_batch_size, int) else 0

    @property
    def micro_batch_tokens(self) -> int:
        """Largest tokens of a micro-batch unless a row is longer; with `auto` those of the smallest, which is a row."""
        if isinstance(self.micro_batch_size, int):
            return self.micro_batch_size * self.sequence_length
        return tokens_of(self.micro_batch_size) or self.sequence_length

    @property
    def fits_memory(self) -> bool:
        """Whether the size of a micro-batch is found by measuring."""
        return self.micro_batch_size == AUTO

    def broken_rules(self) -> Iterator[Broken]:
        if self.micro_batch_rows and self.global_batch_size % self.micro_batch_rows:
            sizes = f"{self.global_batch_size} and {self.micro_batch_rows}"
            rule = f"global_batch_size must be a multiple of micro_batch_size; got {sizes}"
            yield Broken((("global_batch_size",), ("micro_batch_size",)), rule)
        if self.float8 and self.is_exact:
            rule = "float8 must be false where determinism is exact: torch doesn't promise equal bits of such products"
            yield Broken((("float8",), ("determinism",)), rule)
        if self.lr_scheduler.warmup_steps > self.max_steps:
            got = f"got {self.lr_scheduler.warmup_steps} and {self.max_steps}"
            rule = f"warmup_steps must be at most train.max_steps; {got}"
            yield Broken((("lr_scheduler", "warmup_steps"), ("max_steps",)), rule)
        decay_steps = self.lr_scheduler.decay_steps or 0
        if self.lr_scheduler.warmup_steps + decay_steps > self.max_steps >= self.lr_scheduler.warmup_steps:
            got = f"got {self.lr_scheduler.warmup_steps}, {decay_steps} and {self.max_steps}"
            rule = f"warmup_steps and decay_steps must be at most train.max_steps together; {got}"
            keys = (("lr_scheduler", "decay_steps"), ("lr_scheduler", "warmup_steps"), ("max_steps",))
            yield Broken(keys, rule)


def broken_compilation(
    train: TrainSpec, foreign: str | None, has_adapters: bool, has_equal_rows: bool, stages_have_lengths: bool
) -> Iterator[Broken]:
    """Rules between compiled parts and the rest of a job.

    Args:
        foreign: whose model it is; None for our own.
        has_adapters: whether low-rank adapters are trained.
        has_equal_rows: whether the rows of the data have the same number of tokens.
        stages_have_lengths: whether those of a curriculum's stages differ.
    """
    if not train.torch_compile:
        return
    here = ("train", "torch_compile")
    if foreign is not None:
        rule = f"torch_compile must be false with a model of {foreign}: it compiles parts of our own model"
        yield Broken((here, ("model", "impl"), ("model", "entrypoint")), rule)
    if train.quantization is not None or train.float8:
        key = "float8" if train.float8 else "quantization"
        rule = f"torch_compile must be false with {key}, whose products torch's compiler doesn't take"
        yield Broken((here, ("train", key)), rule)
    if has_adapters:
        rule = "torch_compile must be false with adapters: layers share no code where some parameters aren't trained"
        yield Broken((here, ("model", "lora")), rule)
    elif train.trainable != ("*",):
        rule = "torch_compile must be false where some parameters aren't trained: layers share no code then"
        yield Broken((here, ("train", "trainable")), f"{rule}; got trainable {', '.join(train.trainable)}")
    why = "with torch_compile and determinism exact, as code depends on the shape of micro-batches"
    if train.is_exact and not train.micro_batch_rows:
        rule = f"micro_batch_size must be a number of rows {why}; got {train.micro_batch_size}"
        yield Broken((here, ("train", "micro_batch_size")), rule)
    if train.is_exact and not has_equal_rows:
        rule = f"rows must be of equal length {why}: text with row_format packed; got rows of their own lengths"
        yield Broken((here, ("data", "row_format"), ("task", "name")), rule)
    if train.is_exact and stages_have_lengths:
        rule = f"stages must have no other sequence_length {why}; got one"
        yield Broken((here, ("curriculum", "stages")), rule)
