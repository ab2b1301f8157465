"""Inventory of the training state: every tensor of it, with the properties by which all others treat it.

A technique that adds state adds its entries to `inventory`, and the engine provides their memory in `Engine.ranges`
under the same names. Rescales then move the tensors, snapshots keep them, checkpoints save and restore them. What an
update makes (`Origin.UPDATE`) must be made by its replay too (`engine.optim.replayer.Replayer`). Pure.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, IntEnum
from fnmatch import fnmatchcase
from itertools import product

from orchestrator.errors import UsageError
from orchestrator.spec.communication import CompressionSpec
from orchestrator.spec.job import JobSpec
from orchestrator.spec.optimizer import ADAFACTOR, ADAMW, LION, MUON, OF_MATRICES, SGD
from orchestrator.spec.train import TrainSpec

# Kinds, the first parts of tensors' names.
PARAM = "param"
MASTER = "master"  # a parameter in fp32 where `TrainSpec.has_masters`; in a checkpoint always
EXP_AVG, EXP_AVG_SQ, MOMENTUM = "exp_avg", "exp_avg_sq", "momentum_buffer"  # of update rules
FACTORS = "exp_avg_sq_factors"  # of each matrix: by row, then by column
EMA = "ema"  # average of the masters
BUFFER = "buffer"
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


@dataclass(frozen=True)
class ParamSpec:
    """One parameter of the whole model.

    Args:
        expert: its expert's global id, None if it is dense.
        blocks: matrices of equal shape that are stacked in it.
        update: its update rule, and its learning rate over the job's. Parameters of a bucket have this in common.
        weight_decay: of each update.
        is_trained: it has gradients and updates; else it is constant.
    """

    name: str
    shape: tuple[int, ...]
    expert: int | None
    blocks: int = 1
    update: tuple[str, float] = (ADAMW, 1.0)
    weight_decay: float = 0.0
    is_trained: bool = True

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
        settings, is_trained = train.optimizer.settings_of(self.name, self.shape), train.is_trained(self.name)
        return replace(self, update=settings.update, weight_decay=settings.weight_decay, is_trained=is_trained)

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

    REFUSE = "refuse"  # every checkpoint has it; another one is refused
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


def inventory(
    params: Sequence[ParamSpec], job: JobSpec, buffers: Iterable[tuple[str, tuple[int, ...]]]
) -> dict[str, StateTensor]:
    """The training state of a job.

    Args:
        params: every parameter of the whole model, in the engine's order.
        buffers: (name, shape) of the model's persistent buffers, fp32.

    Raises:
        ValueError: a name that occurs twice.
        UsageError: patterns of parameters that fit none.
    """
    train = job.train
    _check_patterns(train, [param.name for param in params])
    _check_experts(train, params)
    params = [param.with_settings(train) for param in params]
    tensors = [_weights(param, train) for param in params]
    params = [param for param in params if param.is_trained]
    kept = [(MASTER,) * train.has_masters + OF_RULE[p.update[0]] + (EMA,) * (train.ema is not None) for p in params]
    for kind in dict.fromkeys(kind for kinds in kept for kind in kinds):
        having = [param for param, kinds in zip(params, kept, strict=True) if kind in kinds]
        tensors += [
            StateTensor(f"{kind}/{p.name}", p.shape_of(kind), Sharing.SHARDED, Origin.UPDATE, p) for p in having
        ]
    tensors += [StateTensor(f"{BUFFER}/{name}", shape, Sharing.REPLICATED, Origin.COPY) for name, shape in buffers]
    tensors += _of_compression(params, job.communication.compression)
    twice = [name for name, count in Counter(tensor.name for tensor in tensors).items() if count > 1]
    if twice:
        raise ValueError(f"tensors {twice} are named twice in a state; names are distinct")
    return {tensor.name: tensor for tensor in tensors}


def _check_patterns(train: TrainSpec, names: Sequence[str]) -> None:
    trained = [name for name in names if train.is_trained(name)]
    unused = [pattern for pattern in train.trainable if not any(fnmatchcase(name, pattern) for name in names)]
    wrong = {"train.trainable": unused, "train.optimizer.groups": train.optimizer.unmatched(trained)}
    for key, patterns in wrong.items() if names else ():
        if patterns:
            raise UsageError(
                f"{key}: {', '.join(patterns)} fits none of the model's {len(names)} parameters, or only some that "
                "aren't trained or that a pattern before it has",
                remedy=f"Parameters are named as {names[0]} and {names[-1]}; `*` fits any text.",
                unchanged="Nothing was trained.",
            )


def _check_experts(train: TrainSpec, params: Sequence[ParamSpec]) -> None:
    """Refuse to train some experts of a layer alone: ranks without any of them would send their gradients at other
    moments of a backward pass than the others, which the one communicator of GPUs doesn't allow."""
    trained: dict[str, set[bool]] = {}
    for param in params:
        if param.expert is not None:
            part = param.name.replace(f".experts.{param.expert}.", ".experts.*.")
            trained.setdefault(part, set()).add(train.is_trained(param.name))
    if partly := [part for part, which in trained.items() if len(which) > 1]:
        raise UsageError(
            f"train.trainable picks some of the experts' {partly[0]}; those of a layer are trained together",
            remedy=f"Name all of them, as {partly[0]}, or none.",
            unchanged="Nothing was trained.",
        )


def _weights(param: ParamSpec, train: TrainSpec) -> StateTensor:
    return StateTensor(
        f"{PARAM}/{param.name}",
        param.shape,
        Sharing.REPLICATED,
        Origin.GATHER if param.is_trained else Origin.CONSTANT,
        param,
        dtype="bfloat16" if train.precision == "bf16" else "float32",
        stored_as=f"{MASTER}/{param.name}",
        is_copy=train.has_masters and param.is_trained,
    )


def _of_compression(params: Sequence[ParamSpec], compression: CompressionSpec) -> Iterator[StateTensor]:
    """State that gradient compression keeps between steps."""
    compressed = [param for param in params if is_compressed(param, compression)]
    kinds = [RESIDUAL] * compression.error_feedback + [VELOCITY] * (compression.momentum > 0)
    for kind, p in product(kinds, compressed):
        yield StateTensor(f"{kind}/{p.name}", p.shape, Sharing.PARTIAL, Origin.COPY, absent=Absent.FIRST)
    for p in compressed if compression.scheme == "powersgd" else ():
        shape = (p.numel // p.rows, rank_of_product(p, compression))
        yield StateTensor(f"{THIN}/{p.name}", shape, Sharing.REPLICATED, Origin.COPY, absent=Absent.FIRST)


# -- Names in checkpoints ----------------------------------------------------------------------------------------------


def saved_shapes(tensors: Inventory) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that all checkpoints have, by its name in them."""
    return {tensor.stored: tensor.shape for tensor in tensors.values() if tensor.absent is Absent.REFUSE}


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
    return compression.is_active and param.expert is None and is_large and ".router." not in f".{param.name}"


def rank_of_product(param: ParamSpec, compression: CompressionSpec) -> int:
    """Columns of the two matrices that PowerSGD sends instead of a parameter's gradient. Both are summed over the
    ranks, which sends them twice."""
    columns = param.numel // param.rows
    return max(1, int(compression.share * param.numel / (2 * (param.rows + columns))))
