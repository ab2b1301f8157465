"""The inventory of a job: the tensors of its training state.

A technique that adds state adds its entries here, and the engine provides their memory in `Engine.ranges` under the
same names. Rescales then move the tensors, snapshots keep them, checkpoints save and restore them. What an update makes
(`Origin.UPDATE`) must be made by its replay too (`engine.optim.replayer.Replayer`). Pure.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import product

from orchestrator.elastic.state_spec import (
    BUFFER,
    EMA,
    MASTER,
    OF_RULE,
    PARAM,
    RESIDUAL,
    SALIENCY,
    THIN,
    VELOCITY,
    Absent,
    Origin,
    ParamSpec,
    Sharing,
    StateTensor,
    adapted_by,
    is_compressed,
    rank_of_product,
)
from orchestrator.errors import UsageError
from orchestrator.spec.communication import CompressionSpec
from orchestrator.spec.job import JobSpec
from orchestrator.spec.optimizer import is_hidden_matrix
from orchestrator.spec.pruning import HEADS, NEURONS, OF_FOUR, TWO_OF_FOUR, PruneTargetSpec
from orchestrator.spec.quantization import NEVER, is_quantizable
from orchestrator.spec.train import TrainSpec

ANOTHER = 10**6  # number of an expert that no model has


def inventory(
    params: Sequence[ParamSpec], job: JobSpec, buffers: Iterable[tuple[str, tuple[int, ...]]]
) -> dict[str, StateTensor]:
    """The training state of a job.

    Args:
        params: every parameter of the whole model, in the engine's order.
        buffers: (name, shape) of the model's persistent buffers, fp32.

    Raises:
        ValueError: a name that occurs twice.
        UsageError: patterns of parameters that fit none, or that give muon none that it updates; or pruning that the
            model's parameters don't allow.
    """
    train = job.train
    _check_patterns(train, [param.name for param in params])
    _check_muon(train, params)
    _check_experts(train, params)
    _check_adapters(train, params)
    _check_pruning(job, params)
    _check_quantization(train, params)
    params = [param.with_settings(train) for param in params]
    tensors = [_weights(param, job) for param in params]
    params = [param for param in params if param.is_trained]
    kept = [(MASTER,) * train.has_masters + OF_RULE[p.update[0]] + (EMA,) * (train.ema is not None) for p in params]
    for kind in dict.fromkeys(kind for kinds in kept for kind in kinds):
        having = [param for param, kinds in zip(params, kept, strict=True) if kind in kinds]
        tensors += [
            StateTensor(f"{kind}/{p.name}", p.shape_of(kind), Sharing.SHARDED, Origin.UPDATE, p) for p in having
        ]
    tensors += [_buffer(name, shape) for name, shape in buffers]
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


def _check_muon(train: TrainSpec, params: Sequence[ParamSpec]) -> None:
    trained = {param.name: param.shape for param in params if train.is_trained(param.name)}
    if left := train.optimizer.left_by_muon(trained):
        raise UsageError(
            f"train.optimizer.groups: {', '.join(left)} is given to muon, which updates none of its parameters: it "
            "takes matrices but embeddings, routers and the output matrix (docs/optimizers.md has their names)",
            remedy="Name another rule there, such as adamw, or rename a parameter that is none of these.",
            unchanged="Nothing was trained.",
        )


def _check_experts(train: TrainSpec, params: Sequence[ParamSpec]) -> None:
    """Refuse to train some experts of a layer alone: ranks without any of them would send their gradients at other
    moments of a backward pass than the others, which the one communicator of GPUs doesn't allow."""
    trained: dict[str, set[bool]] = {}
    for param in params:
        if param.expert is not None:
            trained.setdefault(_of_any_expert(param), set()).add(train.is_trained(param.name))
    if partly := [part for part, which in trained.items() if len(which) > 1]:
        raise UsageError(
            f"train.trainable picks some of the experts' {partly[0]}; those of a layer are trained together",
            remedy=f"Name all of them, as {partly[0]}, or none.",
            unchanged="Nothing was trained.",
        )


def _check_adapters(train: TrainSpec, params: Sequence[ParamSpec]) -> None:
    """Refuse to train no adapters where there are some, or also matrices that have one."""
    trained = {param.name for param in params if train.is_trained(param.name)}
    adapted = {param.name: adapted_by(param.name) for param in params if adapted_by(param.name) is not None}
    if adapted and not trained & adapted.keys():
        wrong = "has none of the adapters of model.lora"
    elif twice := sorted(trained & {*adapted.values()}):
        wrong = f"has matrices that adapters stand for, {', '.join(twice[:3])}"
    else:
        return
    raise UsageError(
        f"train.trainable: {', '.join(train.trainable)} {wrong}",
        remedy='Leave it out, or name adapters, as "*.lora.*", and what else is to be trained beside them.',
        unchanged="Nothing was trained.",
    )


def _check_pruning(job: JobSpec, params: Sequence[ParamSpec]) -> None:
    """Refuse targets of pruning that the model's parameters don't allow."""
    pruning = job.train.pruning
    for place, target in enumerate(pruning.targets if pruning is not None and params else ()):
        assert pruning is not None
        mine = [param for param in params if pruning.target_of(param.name, param.shape) is target]
        if found := _unfit_target(job, target, mine, params):
            wrong, remedy = found
            raise UsageError(
                f"train.pruning.targets: entry {place + 1}, {target.pattern}, {wrong}",
                remedy=remedy,
                unchanged="Nothing was trained.",
            )


def _unfit_target(
    job: JobSpec, target: PruneTargetSpec, mine: Sequence[ParamSpec], params: Sequence[ParamSpec]
) -> tuple[str, str] | None:
    """What is wrong with a target of pruning, and the remedy; None if nothing is.

    Args:
        mine: the parameters that belong to it.
    """
    names = {param.name for param in mine}
    of_others = [p.name for p in params if target.is_structured and target.has(p.name, p.shape) and p.name not in names]
    if of_others:
        wrong = f"prunes whole {target.pattern}, and a target before it has a part of them, {of_others[0]}"
        return wrong, "Put it first, or leave these matrices out of the other's params."
    if not mine:
        some = [param.name for param in params if is_hidden_matrix(param.name, param.shape)]
        named = " and ".join((some[:1] + some[-1:]) or ["none"])
        wrong = "fits no matrix of the model, or only some that a target before it has"
        return wrong, f"Matrices are named as {named}; `*` fits any text."
    if frozen := [param.name for param in mine if not job.train.is_trained(param.name)]:
        wrong = f"has matrices that train.trainable leaves as they are, {', '.join(frozen[:3])}"
        return wrong, "Train them, or name others in params."
    kinds = {_of_any_expert(param) for param in mine}
    partly = [_of_any_expert(p) for p in params if p.name not in names and _of_any_expert(p) in kinds]
    if partly := partly + [_of_any_expert(p) for p in mine if not target.has(_of_another_expert(p), p.shape)]:
        wrong = f"picks some of the experts' {partly[0]}; experts change their numbers as others are added or left out"
        return wrong, f"Name all of them, as {partly[0]}, or none."
    if target.pattern == HEADS and job.model.qk_norm == "all_heads":
        return "doesn't go with model.qk_norm: all_heads, whose mean is over all heads", "Leave it out."
    if target.pattern == TWO_OF_FOUR and (odd := [p for p in mine if p.shape[1] % OF_FOUR]):
        wrong = f"needs rows of a multiple of {OF_FOUR} weights, and {odd[0].name} has shape {odd[0].shape}"
        return wrong, "Choose other sizes, or leave such matrices out of params."
    for count in sorted(_num_units(job, target, mine)):
        if not 0 < target.count(count) < count:
            which = "none" if not target.count(count) else "all"
            wrong = f"would prune {which} of {count} {target.pattern} with sparsity {target.sparsity:g}"
            fits = f"from {math.ceil(1000 / count) / 1000:g} to {(count - 1) / count:.3g}"
            return wrong, f"Choose a sparsity {fits}." if count > 1 else "Leave it out: a single one must stay."
    return None


def _check_quantization(train: TrainSpec, params: Sequence[ParamSpec]) -> None:
    """Refuse patterns of matrices that can't be quantized, some experts alone, and groups that don't divide rows."""
    quantization = train.quantization
    if quantization is None or not params:
        return
    matrices = [param for param in params if is_quantizable(param.name, param.shape)]
    mine = [param for param in matrices if quantization.has(param.name, param.shape)]
    unused = [each for each in quantization.params if not any(fnmatchcase(p.name, each) for p in matrices)]
    kinds, names = {_of_any_expert(param) for param in mine}, {param.name for param in mine}
    partly = [_of_any_expert(p) for p in matrices if p.name not in names and _of_any_expert(p) in kinds]
    partly += [_of_any_expert(p) for p in mine if not quantization.has(_of_another_expert(p), p.shape)]
    size = quantization.group_size
    odd = [param for param in mine if size is not None and param.shape[1] % size]
    if unused:
        key, remedy = "params", "Matrices are named as layers.0.attention.query and layers.*.experts.*.down."
        wrong = f"{', '.join(unused)} fits no matrix that can be quantized: {NEVER} never are in training"
    elif partly:
        key, remedy = "params", f"Name all of them, as {partly[0]}, or none."
        wrong = (
            f"it picks some of the experts' {partly[0]}; experts change their numbers as others are added or left out"
        )
    elif odd:
        key, remedy = "group_size", "Choose a size that divides it, or null, or leave such matrices out of params."
        wrong = f"{size} doesn't divide the rows of {odd[0].name}, which have {odd[0].shape[1]} weights"
    else:
        return
    raise UsageError(f"train.quantization.{key}: {wrong}", remedy=remedy, unchanged="Nothing was trained.")


def _of_any_expert(param: ParamSpec) -> str:
    """The name of a parameter with `*` in place of its expert's number; its own where it belongs to none."""
    return param.name if param.expert is None else param.name.replace(f".experts.{param.expert}.", ".experts.*.")


def _of_another_expert(param: ParamSpec) -> str:
    """The name of a parameter as that of an expert that growth may add; its own where it belongs to none."""
    return _of_any_expert(param).replace(".experts.*.", f".experts.{ANOTHER}.")


def _num_units(job: JobSpec, target: PruneTargetSpec, params: Sequence[ParamSpec]) -> set[int]:
    """Numbers of neurons or heads that a structured target finds in modules of our own model."""
    if target.pattern == NEURONS:
        return {param.shape[1] for param in params if param.name.endswith(".down")}
    model = job.model
    heads = model.num_key_value_heads if model.kv_lora_rank is None else model.num_attention_heads
    return {heads} if target.pattern == HEADS else set()


def _weights(param: ParamSpec, job: JobSpec) -> StateTensor:
    train = job.train
    return StateTensor(
        f"{PARAM}/{param.name}",
        param.shape,
        Sharing.REPLICATED,
        Origin.GATHER if param.is_trained else Origin.CONSTANT,
        param,
        dtype="bfloat16" if train.precision == "bf16" else "float32",
        stored_as=f"{MASTER}/{param.name}",
        is_copy=train.has_masters and param.is_trained,
        is_base=job.model.lora is not None and not param.is_trained and adapted_by(param.name) is None,
    )


def _buffer(name: str, shape: tuple[int, ...]) -> StateTensor:
    absent = Absent.FIRST if name.endswith(SALIENCY) else Absent.REFUSE
    return StateTensor(f"{BUFFER}/{name}", shape, Sharing.REPLICATED, Origin.COPY, absent=absent)


def _of_compression(params: Sequence[ParamSpec], compression: CompressionSpec) -> Iterator[StateTensor]:
    """State that gradient compression keeps between steps."""
    compressed = [param for param in params if is_compressed(param, compression)]
    kinds = [RESIDUAL] * compression.error_feedback + [VELOCITY] * (compression.momentum > 0)
    for kind, p in product(kinds, compressed):
        yield StateTensor(f"{kind}/{p.name}", p.shape, Sharing.PARTIAL, Origin.COPY, absent=Absent.FIRST)
    for p in compressed if compression.scheme == "powersgd" else ():
        shape = (p.numel // p.rows, rank_of_product(p, compression))
        yield StateTensor(f"{THIN}/{p.name}", shape, Sharing.REPLICATED, Origin.COPY, absent=Absent.FIRST)
