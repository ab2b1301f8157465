"""Export of a checkpoint as a directory that `transformers` loads: weights, configuration, tokenizer.

Tensors are read one at a time, so peak memory is that of one weights file.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from safetensors import TensorSpec, serialize_file
from tokenizers import Tokenizer

from orchestrator.checkpoint.hf.families import family_of_spec
from orchestrator.checkpoint.hf.family import KEYS, QUERY, ROUTER, folded, folds
from orchestrator.checkpoint.read import CheckpointReader, read_manifest
from orchestrator.elastic.expert_change import ExpertSet
from orchestrator.elastic.state_spec import MASTER, average_of, of_model
from orchestrator.errors import CheckpointCorrupt, UsageError
from orchestrator.spec.job import JobSpec
from orchestrator.spec.model import ModelSpec
from orchestrator.storage.atomic import new_directory
from orchestrator.storage.backends.location import Location, objects_at

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
INTEGERS = ("int8", "int4")  # formats that need an `Encoding`
FILE_BYTES = 4 * 2**30  # a weights file is closed once it reaches this size
FP32_ALWAYS = ("mlp.gate.weight", "e_score_correction_bias")  # of Glm4Moe, which keeps these in fp32
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
WEIGHTS = "model-{number:05d}-of-{count:05d}.safetensors"

Array = npt.NDArray[Any]


class Encoding(Protocol):
    """Another form of the tensors in a directory."""

    def encoded(self, name: str, their_name: str, values: Array) -> Iterator[tuple[str, Array]]:
        """One of their tensors, in fp32, that is made of ours of this name, as it is written."""

    def section(self) -> dict[str, Any]:
        """The `quantization_config` of `config.json`, once all tensors are encoded."""


def export_hf(
    checkpoint: Location,
    job: JobSpec,
    tokenizer: Location,
    to: Path,
    dtype: str | None = None,
    of_ema: bool = False,
    write_other: Callable[[Path], int] | None = None,
) -> int:
    """Write the directory `to`, which must be new or empty. It appears atomically, by a rename.

    Args:
        dtype: number format of the weights, fp32 or bf16, or with `write_other` int8 or int4; routers stay fp32. None:
            that of the job's forward pass.
        of_ema: the average of the weights in place of the weights.
        write_other: writes config and weights of a model that a checkpoint alone doesn't have into a directory, and
            returns their bytes: of one that transformers builds, or of one with adapters, merged.

    Returns:
        bytes of weights.

    Raises:
        UsageError: `to` is not empty, the format cannot express the model, or the run keeps no average.
        CheckpointCorrupt: the checkpoint can't be read, or belongs to another model.
    """
    refuse_used(to)
    if job.model.entrypoint is not None:
        raise UsageError(
            f"run {job.name} trains a user's model, {job.model.entrypoint}, which transformers does not know",
            remedy="Read its checkpoint instead: each shard is a safetensors file, under your module's names.",
            unchanged="Nothing was written.",
        )
    if not job.has_tokens:
        raise UsageError(
            f"run {job.name} trains on rows of arrays and has no tokenizer, which such a directory needs",
            remedy="Read its checkpoint instead: each shard is a safetensors file.",
            unchanged="Nothing was written.",
        )
    refuse_missing_average(job, of_ema)
    if (experts := read_manifest(checkpoint).experts) is not None:
        _refuse_families(job, experts)
    saved = objects_at(tokenizer.parent).get(tokenizer.name)
    library = Tokenizer.from_str(saved.decode())
    vocab_size = job.model.vocab_size or max(library.get_vocab().values()) + 1
    dtype = dtype or job.train.precision
    write = write_other or partial(_write_model, checkpoint, job, vocab_size, dtype, of_ema)
    with new_directory(to) as directory:
        num_bytes = write(directory)
        (directory / TOKENIZER).write_bytes(saved)
        border = _border(tokenizer.parent) or library.get_added_tokens_decoder()[0].content
        ends = border
        if (chats := _chat_template(tokenizer.parent)) is not None:
            (directory / "chat_template.jinja").write_text(chats["template"])
            ends = chats["tokens"].get("eos_token", "<|im_end|>")
            ends = ends if library.token_to_id(ends) is not None else border
        _write_tokenizer_config(border, ends, library, job.train.sequence_length, directory)
    return num_bytes


def refuse_used(to: Path) -> None:
    """Raise UsageError unless a directory is new or empty."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UsageError(
            f"{to} exists and is not empty", remedy="Name a new directory with --out.", unchanged="Nothing was written."
        )


def refuse_missing_average(job: JobSpec, of_ema: bool) -> None:
    """Raise UsageError if the average of the weights is wanted of a run that keeps none."""
    if of_ema and job.train.ema is None:
        raise UsageError(
            f"run {job.name} keeps no average of its weights",
            remedy="Set train.ema in its job, or leave out --weights.",
            unchanged="Nothing was written.",
        )


def _write_model(checkpoint: Location, job: JobSpec, vocab_size: int, dtype: str, of_ema: bool, directory: Path) -> int:
    experts = read_manifest(checkpoint).experts
    if experts is not None:
        job = job.with_experts(experts.num_experts)
    with CheckpointReader(checkpoint) as reader:
        _check_sizes(reader, {f"{MASTER}/head": (vocab_size, job.model.hidden_size)})
        return write_model(_tensors(reader, job.model, of_ema), job, vocab_size, dtype, directory)


def write_model(
    tensors: Iterable[tuple[str, Array]],
    job: JobSpec,
    vocab_size: int,
    dtype: str,
    directory: Path,
    encoding: Encoding | None = None,
) -> int:
    """Write config and weights of our own model into a directory.

    Args:
        tensors: weights and buffers in fp32, under our names.
        dtype: fp32 or bf16.
        encoding: of the tensors, of which those that stay are written in `dtype`. None: all stay.

    Returns:
        bytes of weights.

    Raises:
        UsageError: no family can express the model.
    """
    family = family_of_spec(job.model)
    config = family.configuration(job.model, vocab_size, job.train.sequence_length, DTYPES[dtype])
    renamed = ((name, *each) for name, t in tensors for each in family.renamed(name, t, job.model.embedding_scale))
    encode = (lambda _, their_name, t: iter(((their_name, t),))) if encoding is None else encoding.encoded
    num_bytes = _write_weights((each for one in renamed for each in encode(*one)), DTYPES[dtype], directory)
    if encoding is not None:
        config["quantization_config"] = encoding.section()
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return num_bytes


def _refuse_families(job: JobSpec, experts: ExpertSet) -> None:
    if experts.families:
        raise UsageError(
            f"experts of run {job.name} are families of clones, of which a token visits the best one, and transformers "
            "knows no such limit",
            remedy=f"Dissolve them, `orchestrator experts set {job.name} {experts.num_experts} --dissolve`, train "
            "further, and export a later checkpoint.",
            unchanged="Nothing was written.",
        )


def _check_sizes(reader: CheckpointReader, wanted: dict[str, tuple[int, ...]]) -> None:
    for name, shape in wanted.items():
        entry = reader.manifest.tensors.get(name)
        if entry is None or entry.shape != shape:
            found = "no such tensor" if entry is None else f"shape {entry.shape}"
            raise CheckpointCorrupt(f"{reader.path}: {name} has {found}; the run's job and tokenizer imply {shape}")


def _tensors(reader: CheckpointReader, spec: ModelSpec, of_ema: bool) -> Iterator[tuple[str, Array]]:
    """Weights and buffers in fp32, under our names, with routers of two matrices as one."""
    keys_of_tensors = {name: key for key in reader.manifest.tensors if (name := of_model(key)) is not None}

    def read(name: str) -> Array:
        key = keys_of_tensors[name]
        average = average_of(key)
        key = average if of_ema and average in reader.manifest.tensors else key
        entry = reader.manifest.tensors[key]
        return reader.read(key, 0, entry.numel).reshape(entry.shape)

    return with_folded_routers(keys_of_tensors, read, spec)


def with_folded_routers(
    names: Iterable[str], read: Callable[[str], Array], spec: ModelSpec
) -> Iterator[tuple[str, Array]]:
    """Tensors of our model by name, with routers of two matrices as one.

    Args:
        read: a tensor in fp32, by name.
    """
    for name in names:
        if folds(spec) and name.endswith(KEYS):
            continue  # read with the queries
        tensor = read(name)
        if folds(spec) and name.endswith(QUERY):
            layer = name.removesuffix(QUERY)
            name, tensor = layer + ROUTER, folded(tensor, read(layer + KEYS), spec)
        yield name, tensor


def _write_weights(tensors: Iterator[tuple[str, Array]], dtype: str, directory: Path) -> int:
    """Write files of about `FILE_BYTES` and their index, and return the bytes. Files get their names at the end."""
    files: list[list[str]] = []
    held: dict[str, tuple[str, tuple[int, ...], Array]] = {}  # dtype, shape, data
    total = size = 0

    def close() -> None:
        specs = {
            n: TensorSpec(dtype=kept, shape=shape, data_ptr=data.ctypes.data, data_len=data.nbytes)
            for n, (kept, shape, data) in held.items()
        }
        path = directory / f"part-{len(files)}"
        path.touch()  # keeps the umask's permissions; safetensors would make a file that only its owner can read
        mode = path.stat().st_mode
        serialize_file(specs, path, {"format": "pt"})
        path.chmod(mode)
        files.append(list(held))
        held.clear()

    for name, tensor in tensors:
        kept = "float32" if name.endswith(FP32_ALWAYS) else dtype
        if not np.issubdtype(tensor.dtype, np.floating):
            kept = tensor.dtype.name
        data: Array = rounded_to_bf16(tensor) if kept == "bfloat16" else np.ascontiguousarray(tensor)
        held[name] = (kept, tensor.shape, data)
        size += data.nbytes
        if size >= FILE_BYTES:
            close()
            total, size = total + size, 0
    if held:
        close()
        total += size
    places: dict[str, str] = {}
    for index, names in enumerate(files):
        file = WEIGHTS.format(number=index + 1, count=len(files))
        (directory / f"part-{index}").rename(directory / file)
        places |= dict.fromkeys(names, file)
    index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2)
    (directory / "model.safetensors.index.json").write_text(index_text + "\n")
    return total


def rounded_to_bf16(values: Array) -> npt.NDArray[np.uint16]:
    """bf16 values as uint16 bits, as numpy has no bf16: upper halves of fp32, rounded to nearest, ties to even. NaN is
    not supported."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _border(run: Location) -> str | None:
    """The token that begins documents, which is named beside an imported tokenizer."""
    try:
        return str(json.loads(objects_at(run).get(TOKENIZER_CONFIG))["bos_token"])
    except FileNotFoundError:
        return None


def _chat_template(run: Location) -> dict[str, Any] | None:
    """The template of a run's chats, and the special tokens that it knows; None for a run of text."""
    try:
        found: dict[str, Any] = json.loads(objects_at(run).get("chat_template.json"))
    except FileNotFoundError:
        return None
    return found


def _write_tokenizer_config(border: str, ends: str, library: Tokenizer, sequence_length: int, directory: Path) -> None:
    """Write the tokenizer's configuration. The token that separates documents is BOS, and EOS too unless answers of
    chats end by another one."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": border,
        "eos_token": ends,
        "model_max_length": sequence_length,
        "clean_up_tokenization_spaces": False,
    }
    (directory / TOKENIZER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    generation = {"bos_token_id": library.token_to_id(border), "eos_token_id": library.token_to_id(ends)}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
