"""Inventory of the training state: every tensor of it, with the properties by which all others treat it.

A technique that adds state adds its entries to `inventory`, and its engine provides the memory in `Engine.ranges` under
the same names. Rescales then move the tensors, snapshots keep them, checkpoints save and restore them. Pure.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum

from orchestrator.spec.communication import CompressionSpec
from orchestrator.spec.job import JobSpec

# Kinds, the first parts of tensors' names.
PARAM = "param"
MASTER = "master"  # a parameter in fp32 where `param` has lower precision; in a checkpoint always
MOMENTS = ("exp_avg", "exp_avg_sq")
BUFFER = "buffer"
RESIDUAL, VELOCITY, THIN = "residual", "velocity", "powersgd"  # of gradient compression

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
SMALL = 1024  # elements; gradients of smaller parameters aren't worth compressing


@dataclass(frozen=True)
class ParamSpec:
    """One trainable parameter of the whole model.

    Args:
        expert: its expert's global id, None if it is dense.
    """

    name: str
    shape: tuple[int, ...]
    expert: int | None

    def __post_init__(self) -> None:
        if self.numel < 1:
            raise ValueError(f"parameter {self.name} has {self.numel} elements; it needs at least one")

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Of a matrix, its first dimension; 1 for a vector."""
        return self.shape[0] if len(self.shape) > 1 else 1


class Sharing(IntEnum):
    """How the ranks of a tensor share it."""

    SHARDED = 0  # disjoint ranges cover it
    REPLICATED = 1  # each holder has all of it, and the same
    PARTIAL = 2  # each holder has values for all of it; the tensor is their sum


class Origin(Enum):
    """What makes a tensor's values of the next step, and so which of them a delta holds (`elastic.snapshot_layout`)."""

    UPDATE = "update"  # its rank's update: remade from the gradients, so none of them
    GATHER = "gather"  # the updates of all its holders: those that other ranks update
    COPY = "copy"  # anything else: all


class Absent(Enum):
    """What a tensor is after a restore from a checkpoint that lacks it."""

    REFUSE = "refuse"  # every checkpoint has it
    FIRST = "first"  # as before the first update (`Engine.on_weights_initialized`)


@dataclass(frozen=True)
class StateTensor:
    """One tensor of the training state of a job, the same in every world.

    Args:
        name: `KIND/PARAMETER` or `KIND/BUFFER`, distinct.
        dtype: torch's name of it.
        like: the parameter whose holders it has, or whose cut if it is sharded; None: all ranks hold it.
        stored: its name in checkpoints.
        is_copy: it is the tensor `stored`, rounded to `dtype`: no checkpoint and no fingerprint contains it.

    Raises:
        ValueError: a tensor that is sharded like nothing, or like a parameter of another size.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    sharing: Sharing
    like: ParamSpec | None
    origin: Origin
    absent: Absent
    stored: str
    is_copy: bool = False

    def __post_init__(self) -> None:
        if self.sharing is Sharing.SHARDED and (self.like is None or self.like.numel != self.numel):
            raise ValueError(f"{self.name} of {self.numel} elements is sharded like {self.like}; sizes must be equal")

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
    """
    mixed = job.train.precision == "bf16"
    tensors = [_weights(param, mixed) for param in params]
    for kind in (MASTER, *MOMENTS) if mixed else MOMENTS:
        tensors += [_sharded(f"{kind}/{param.name}", param) for param in params]
    tensors += [_on_all_ranks(f"{BUFFER}/{name}", shape, Sharing.REPLICATED, Absent.REFUSE) for name, shape in buffers]
    tensors += _of_compression(params, job.communication.compression)
    found = {tensor.name: tensor for tensor in tensors}
    if len(found) < len(tensors):
        twice = [name for name, count in Counter(tensor.name for tensor in tensors).items() if count > 1]
        raise ValueError(f"tensors {twice} are named twice in a state; names are distinct")
    return found


def _weights(param: ParamSpec, mixed: bool) -> StateTensor:
    return StateTensor(
        name=f"{PARAM}/{param.name}",
        shape=param.shape,
        dtype="bfloat16" if mixed else "float32",
        sharing=Sharing.REPLICATED,
        like=param,
        origin=Origin.GATHER,
        absent=Absent.REFUSE,
        stored=f"{MASTER}/{param.name}",
        is_copy=mixed,
    )


def _sharded(name: str, param: ParamSpec) -> StateTensor:
    """State of the optimizer, fp32, whose elements are updated with those of a parameter."""
    return StateTensor(name, param.shape, "float32", Sharing.SHARDED, param, Origin.UPDATE, Absent.REFUSE, name)


def _on_all_ranks(name: str, shape: tuple[int, ...], sharing: Sharing, absent: Absent) -> StateTensor:
    """State in fp32 that no update makes."""
    return StateTensor(name, shape, "float32", sharing, None, Origin.COPY, absent, name)


def _of_compression(params: Sequence[ParamSpec], compression: CompressionSpec) -> list[StateTensor]:
    """State that gradient compression keeps between steps."""
    compressed = [param for param in params if is_compressed(param, compression)]
    tensors = []
    for kind, is_kept in ((RESIDUAL, compression.error_feedback), (VELOCITY, compression.momentum > 0)):
        for param in compressed if is_kept else ():
            tensors.append(_on_all_ranks(f"{kind}/{param.name}", param.shape, Sharing.PARTIAL, Absent.FIRST))
    for param in compressed if compression.scheme == "powersgd" else ():
        shape = (param.numel // param.rows, rank_of_product(param, compression))
        tensors.append(_on_all_ranks(f"{THIN}/{param.name}", shape, Sharing.REPLICATED, Absent.FIRST))
    return tensors


# -- What follows from it ----------------------------------------------------------------------------------------------


def saved_shapes(tensors: Inventory) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that all checkpoints have, by its name in them."""
    return {tensor.stored: tensor.shape for tensor in tensors.values() if tensor.absent is Absent.REFUSE}


def of_model(name: str) -> str | None:
    """The model's parameter or buffer whose values a tensor of the state, or of a checkpoint, has; None: it has none of
    the model, and serves training alone."""
    kind, _, plain = name.partition("/")
    return plain if kind in (PARAM, MASTER, BUFFER) else None


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
