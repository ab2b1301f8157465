"""Loading of a checkpoint into a rank's shard, whatever world wrote it.

Checkpoints hold the fp32 masters; weights in lower precision are made from them, by the same rounding as after a step.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from orchestrator.checkpoint.hf.adapters import open_adapter
from orchestrator.checkpoint.hf.pretrained import open_pretrained
from orchestrator.checkpoint.manifest import CheckpointManifest
from orchestrator.checkpoint.read import CheckpointReader
from orchestrator.elastic.state_map import StateMap
from orchestrator.elastic.state_spec import Absent, Inventory, Sharing, StateTensor
from orchestrator.engine.base import noop
from orchestrator.errors import DataError, NotFound
from orchestrator.protocol.messages import Restore
from orchestrator.spec.model import ModelSpec
from orchestrator.state.pretrained_weights import WeightSource, read_weights
from orchestrator.state.ranges import NamedRanges, Range
from orchestrator.storage.backends.location import Location, location_of
from orchestrator.worker.runtime.errors import OtherModel
from orchestrator.worker.shard.shard import TrainingProgress
from orchestrator.worker.transition.save_shard import part_of
from orchestrator.worker.transition.transformers_files import TransformersFiles

CHUNK = 1 << 22  # elements read at once, which keeps the copy small


@torch.no_grad()
def read_state(
    restore: Restore,
    ranges: NamedRanges,
    tensors: Inventory,
    sampler: str,
    rank: int,
    world_size: int,
    between: Callable[[], None] = noop,
    mapped: StateMap | None = None,
) -> TrainingProgress:
    """Fill this rank's ranges, but for weights that only `model.init_from` has (`read_base`). State that the checkpoint
    may lack keeps its first values if it does, or is to be reset.

    Args:
        tensors: of the state.
        sampler: the sample order that follows from the job and its data; the checkpoint must have the same, except for
            stages of a curriculum, which may have been decided while it trained.
        between: called before each piece is read.
        mapped: map of the checkpoint's state where the ranges are of a model with other experts.

    Returns:
        the training progress.

    Raises:
        CheckpointCorrupt: files are missing or changed; the ranges may be filled in part.
        OtherModel: it belongs to another model.
        DataError: it was trained on another corpus, or in another order.
    """
    checkpoint = location_of(restore.path)
    with CheckpointReader(checkpoint, restore.digest or None) as reader:
        meta = reader.manifest.meta
        try:
            progress = TrainingProgress(int(str(meta["step"])), int(str(meta["num_updates"])), str(meta["sampler"]))
            order = _without_stages(progress.sampler)
        except (KeyError, ValueError) as error:
            raise OtherModel(f"{checkpoint} does not record the training progress: {error!r}") from error
        if order != _without_stages(sampler):
            raise DataError(
                f"{checkpoint} was trained with the sample order {progress.sampler}; job and data give {sampler}",
                remedy="Resume with the corpus, the batch size, the sequence length and the seed that it began with.",
                unchanged="The checkpoint is as it was.",
            )
        others = range(rank, int(str(meta.get("world_size", 0))), world_size)  # ranks whose parts this one reads
        saved = [(tensors[name], held) for name, held in ranges if not tensors[name].is_base]
        wanted = [(tensor, held) for tensor, held in saved if _is_read(tensor, reader.manifest, restore)]
        for tensor, held in wanted:
            if tensor.sharing is Sharing.PARTIAL:
                between()
                _read_parts(reader, tensor.stored, held.data, others)
        whole = [piece for tensor, held in wanted for piece in _pieces(tensor, held, mapped)]
        with _of_this_model(checkpoint):
            for index, start, values in reader.read_all((name, first, stop) for name, first, stop, _ in whole):
                between()
                _, first, _, data = whole[index]
                data[start - first :][: len(values)].copy_(torch.from_numpy(values))
    return progress


def _pieces(tensor: StateTensor, held: Range, mapped: StateMap | None) -> Iterator[tuple[str, int, int, Tensor]]:
    """The (name, start, stop) in a checkpoint of a range's elements, and where they go; none of a partial tensor."""
    if tensor.sharing is Sharing.PARTIAL:
        return
    if mapped is None:
        yield tensor.stored, held.start, held.stop, held.data
        return
    for start, stop, old, first in mapped.within(tensor.name, held.start, held.stop):
        data = held.data[start - held.start : stop - held.start]
        yield mapped.old[old].stored, first, first + stop - start, data


def _is_read(tensor: StateTensor, manifest: CheckpointManifest, restore: Restore) -> bool:
    """Whether a tensor's values come from the checkpoint. Others keep their first values."""
    key = part_of(tensor.stored, 0) if tensor.sharing is Sharing.PARTIAL else tensor.stored
    return tensor.absent is not Absent.FIRST or not (restore.reset_residuals or key not in manifest.tensors)


@contextmanager
def _of_this_model(checkpoint: Location) -> Iterator[None]:
    """Report tensors that a checkpoint lacks, or has in another size, as OtherModel."""
    try:
        yield
    except (NotFound, ValueError) as error:
        raise OtherModel(
            f"{checkpoint} is of another model: {error}",
            remedy="Resume the run that wrote it, with its own job file.",
        ) from error


def _read_parts(reader: CheckpointReader, name: str, data: torch.Tensor, ranks: range) -> None:
    """Sum these ranks' parts of a tensor. Each rank reads others' parts, so that none is lost or counted twice."""
    data.zero_()
    for rank in ranks:
        for start in range(0, data.numel(), CHUNK):
            stop = min(start + CHUNK, data.numel())
            data[start:stop] += torch.from_numpy(reader.read(part_of(name, rank), start, stop)).to(data.device)


def _without_stages(sampler: str) -> object:
    """The state of a sample order, without the stages of a curriculum."""
    state = json.loads(sampler)
    return {**state, "stages": None} if isinstance(state, dict) and "num_tokens" in state else state


# -- First weights of a run, read from a pretrained model's directory into a rank's shard ------------------------------


@torch.no_grad()
def read_pretrained(spec: ModelSpec, ranges: NamedRanges) -> None:
    """Fill this rank's weights, masters, their averages and router biases from `spec.init_from`, and those of adapters
    from `spec.lora.init_from` if there is one. Other state keeps its values.

    Raises:
        UsageError, CheckpointCorrupt: the directory no longer exists, or isn't of this model.
    """
    assert spec.init_from is not None
    read_weights(_source_of(spec, Path(spec.init_from)), ranges)
    if spec.lora is not None and spec.lora.init_from is not None:
        read_weights(open_adapter(spec), ranges)


@torch.no_grad()
def read_base(spec: ModelSpec, tensors: Inventory, ranges: NamedRanges, old: NamedRanges | None = None) -> None:
    """Fill those of this rank's weights that only `spec.init_from` has. Raises as `read_pretrained`.

    Args:
        old: state that this worker holds, some of which may be the same.
    """
    missing = NamedRanges()
    for name, held in ranges:
        if not tensors[name].is_base:
            continue
        if old is not None and old.spans(name) == [(held.start, held.stop)]:
            held.data.copy_(old.view(name, held.start, held.stop))
        else:
            missing.add(name, held.start, held.data)
    if missing.names() and spec.init_from is not None:
        read_weights(_source_of(spec, Path(spec.init_from)), missing)


def _source_of(spec: ModelSpec, directory: Path) -> WeightSource:
    """The directory, checked to be of this model."""
    if spec.impl == "transformers":
        files = TransformersFiles(spec, directory)
        files.check()
        return files
    source = open_pretrained(directory)
    source.check(spec)
    return source
