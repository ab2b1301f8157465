"""Tensors of the training state, with the properties by which all others treat them. `elastic.inventory` lists those of
a job. Pure.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum, IntEnum

from orchestrator.spec.communication import CompressionSpec
from orchestrator.spec.optimizer import ADAFACTOR, ADAMW, LION, MUON, OF_MATRICES, SGD, is_router
from orchestrator.spec.train import TrainSpec

# Kinds, the first parts of tensors' names.
PARAM = "param"
MASTER = "master"  # a parameter in fp32 where `TrainSpec.has_masters`; in a checkpoint always
EXP_AVG, EXP_AVG_SQ, MOMENTUM = "exp_avg", "exp_avg_sq", "momentum_buffer"  # of update rules
FACTORS = "exp_avg_sq_factors"  # of each matrix: by row, then by column
EMA = "ema"  # average of the masters
BUFFER = "buffer"
SALIENCY = ".saliency_E2"  # ends the names of buffers that a checkpoint may lack: a job may come to ask for them
RESIDUAL, VELOCITY, THIN = "residual", "velocity", "powersgd"  # of gradient compression

OF_RULE = {  # kinds, by rule
    ADAMW: (EXP_AVG, EXP_AVG_SQ),
    SGD: (MOMENTUM,),
    LION: (EXP_AVG,),
    MUON: (MOMENTUM,),
    ADAFACTOR: (FACTORS,),
}
ITEM_BYTES = {"float32": 4, "bfloat16": 2}
SMALL = 1024  # elements; gradients of smaller parameters aren't worth compressing


_EXPERT = re.compile(r".\.experts\.(\d+)\.")
_ADAPTER = re.compile(r"(.*)\.lora\.(\w+)\.[AB]")
STACKED = {"gate_up": 2}  # matrices in a parameter, by the last part of its name, or the name of the one that it adapts


@dataclass(frozen=True)
class ParamSpec:
    """One parameter of the whole model.

    Args:
        expert: its expert's global id, None if it is dense.
        blocks: matrices of equal shape that are stacked in it.
        update: its update rule, and its learning rate over the job's. Parameters of a bucket have this in common.
        weight_decay: of each update.
        is_trained: it has gradients and updates; else it is constant.
        is_pruned: updates make some of its elements zero, and keep them so.
    """

    name: str
    shape: tuple[int, ...]
    expert: int | None
    blocks: int = 1
    update: tuple[str, float] = (ADAMW, 1.0)
    weight_decay: float = 0.0
    is_trained: bool = True
    is_pruned: bool = False

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...]) -> "ParamSpec":
        """The parameter of this name, which says whose it is and what is stacked in it."""
        blocks = stacked_in(name)
        is_stacked = len(shape) == 2 and shape[0] % blocks == 0  # else it is a user's of the same name
        return cls(name, shape, expert_of(name), blocks if is_stacked else 1)

    def __post_init__(self) -> None:
        if self.numel < 1:
            raise ValueError(f"parameter {self.name} has {self.numel} elements; it needs at least one")

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_whole(self) -> bool:
        """Whether one rank updates all of it."""
        return self.update[0] in OF_MATRICES

    def with_settings(self, train: TrainSpec) -> "ParamSpec":
        """The parameter as a job trains it."""
        settings, pruning = train.optimizer.settings_of(self.name, self.shape), train.pruning
        return replace(
            self,
            update=settings.update,
            weight_decay=settings.weight_decay,
            is_trained=train.is_trained(self.name),
            is_pruned=pruning is not None and pruning.target_of(self.name, self.shape) is not None,
        )

    @property
    def rows(self) -> int:
        """Of a matrix, its first dimension; 1 for a vector."""
        return self.shape[0] if len(self.shape) > 1 else 1

    def shape_of(self, kind: str) -> tuple[int, ...]:
        """Shape of a kind of state that an update rule keeps of it."""
        if kind != FACTORS:
            return self.shape
        if len(self.shape) < 2:
            return (self.numel,)
        *stacked, rows, columns = self.shape
        return (*stacked, self.blocks, rows // self.blocks + columns)


class Sharing(IntEnum):
    """How the ranks of a tensor share it."""

    SHARDED = 0  # disjoint ranges cover it
    REPLICATED = 1  # each holder has all of it, and the same
    PARTIAL = 2  # each holder has values for all of it; the tensor is their sum


class Origin(Enum):
    """Source of a tensor's values in a step, and so the part of them that a delta holds (`elastic.snapshot_layout`)."""

    UPDATE = "update"  # the update of the rank that holds them: none, since gradients remake them
    GATHER = "gather"  # the updates of all holders, who send each other theirs: those that other ranks update
    COPY = "copy"  # anything else: all
    CONSTANT = "constant"  # nothing changes them: none


class Absent(Enum):
    """Value of a tensor after a restore from a checkpoint that lacks it."""

    REFUSE = "refuse"  # every checkpoint must have it
    FIRST = "first"  # as before the first update (`Engine.on_weights_initialized`); also if residuals are to be reset


@dataclass(frozen=True)
class StateTensor:
    """One tensor of the training state of a job, the same in every world.

    Args:
        name: `KIND/PARAMETER` or `KIND/BUFFER`, distinct.
        like: the parameter whose holders it has, or whose cut if it is sharded; None: all ranks hold it. Only if one
            rank updates all of the parameter, a tensor that is sharded like it may have another size.
        dtype: torch's name of it.
        stored_as: its name in checkpoints, if that is another one.
        is_copy: it is the tensor `stored`, rounded to `dtype`: no checkpoint and no fingerprint contains it.
        is_base: it is constant, and in `model.init_from`: each rank reads what it holds from there, and no transfer,
            snapshot or checkpoint contains it.

    Raises:
        ValueError: a tensor that is sharded like nothing, or like a parameter of another size that is cut.
    """

    name: str
    shape: tuple[int, ...]
    sharing: Sharing
    origin: Origin
    like: ParamSpec | None = None
    dtype: str = "float32"
    absent: Absent = Absent.REFUSE
    stored_as: str = ""
    is_copy: bool = False
    is_base: bool = False

    def __post_init__(self) -> None:
        if self.sharing is Sharing.SHARDED and (self.like is None or not (self._has_its_size or self.like.is_whole)):
            raise ValueError(f"{self.name} of {self.numel} elements is sharded like {self.like}; sizes must be equal")

    @property
    def _has_its_size(self) -> bool:
        return self.like is not None and self.like.numel == self.numel

    def cut(self, start: int, stop: int) -> tuple[int, int]:
        """Its elements that belong to elements [start, stop) of the parameter that it is like."""
        return (start, stop) if self._has_its_size else (0, self.numel)

    def of_param(self, start: int, stop: int) -> tuple[int, int]:
        """Elements of the parameter that its elements [start, stop) belong to."""
        return (start, stop) if self._has_its_size or self.like is None else (0, self.like.numel)

    @property
    def stored(self) -> str:
        """Its name in checkpoints."""
        return self.stored_as or self.name

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]


Inventory = Mapping[str, StateTensor]
"""The tensors of a state by name, in the order of its layouts."""


# -- Names in checkpoints ----------------------------------------------------------------------------------------------


def saved_shapes(tensors: Inventory) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that all checkpoints have, by its name in them."""
    kept = (tensor for tensor in tensors.values() if tensor.absent is Absent.REFUSE and not tensor.is_base)
    return {tensor.stored: tensor.shape for tensor in kept}


def of_model(name: str) -> str | None:
    """The model's parameter or buffer whose values a tensor of the state, or of a checkpoint, has; None: it has none of
    the model, and serves training alone."""
    kind, _, plain = name.partition("/")
    return plain if kind in (PARAM, MASTER, BUFFER) else None


def begins_as(name: str) -> str | None:
    """The model's parameter or buffer whose first values a tensor of the state has; None: zeros, or drawn ones."""
    kind, _, plain = name.partition("/")
    return plain if kind == EMA else of_model(name)


def average_of(name: str) -> str:
    """The tensor with the average of a model's tensor, by the name that this has in checkpoints; a buffer's own."""
    kind, _, plain = name.partition("/")
    return f"{EMA}/{plain}" if kind == MASTER else name


def changes_in_forward(name: str) -> bool:
    """Whether a forward pass may write to a tensor of the state: a model may update its buffers there. All others
    change in updates alone."""
    return name.partition("/")[0] == BUFFER


# -- Parameters whose gradients are compressed -------------------------------------------------------------------------


def is_compressed(param: ParamSpec, compression: CompressionSpec) -> bool:
    """Whether its gradients are compressed. Norms, biases, routers, small tensors and experts are not."""
    is_large = param.rows > 1 and param.numel >= SMALL
    return compression.is_active and param.expert is None and is_large and not is_router(param.name)


def rank_of_product(param: ParamSpec, compression: CompressionSpec) -> int:
    """Columns of the two matrices that PowerSGD sends instead of a parameter's gradient. Both are summed over the
    ranks, which sends them twice."""
    columns = param.numel // param.rows
    return max(1, int(compression.share * param.numel / (2 * (param.rows + columns))))


def stacked_in(name: str) -> int:
    """Matrices that are stacked in a parameter of this name."""
    return STACKED.get((adapted_by(name) or name).rpartition(".")[2], 1)


def adapted_by(name: str) -> str | None:
    """The matrix that a parameter of a low-rank adapter is beside (`spec.lora`); None: it is of none."""
    found = _ADAPTER.fullmatch(name)
    return f"{found[1]}.{found[2]}" if found else None


def layer_of(name: str) -> str:
    """The layer whose expert a parameter belongs to, named as its parameters up to `.experts.`; empty for dense
    parameters."""
    found = _EXPERT.search(name)
    return name[: found.start() + 1] if found else ""


def expert_of(name: str) -> int | None:
    """The global id of the expert that a parameter belongs to; None for dense parameters."""
    found = _EXPERT.search(name)
    return int(found[1]) if found else None
