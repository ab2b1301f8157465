"""Manifest of a checkpoint: the file and key of every element range of every tensor. Pure.

A checkpoint lies in a directory of its own from its first byte on: one safetensors file per writer, under a name that
no other file ever has, and `manifest.json`, which is created last. Nothing is renamed or replaced.

    step-00000120-000003-000007/                                step, term and generation of its writers
    step-00000120-000003-000007/shard-00000-5f1c09d2.safetensors
    step-00000120-000003-000007/manifest.json                   a `CheckpointManifest`, with its own digest

The run's journal names the complete ones, with the manifest's digest. The manifest has the digest of each file's
header, and a header those of the blocks behind it, so any part of a file can be verified alone. The term is in the name
because a generation is unique only together with it: what a controller has journalled may be kept in its cluster, and
be lost with that, while its workers have written already. Another cluster that resumes the run counts on from the
generations that it knows.

The manifest is made from the headers of the files, so ranks report nothing of them but digests.
A manifest lists tensors and pieces, never ranks or a world size, so any world can read the checkpoint of any other.
Tensors are named as in the layout: `master/NAME` (fp32 weights), `exp_avg/NAME`, `exp_avg_sq/NAME`, `buffer/NAME`.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from orchestrator.elastic.expert_change import ExpertSet
from orchestrator.errors import CheckpointCorrupt, ProtocolError
from orchestrator.protocol.worker_report import ShardWritten

FORMAT = "orchestrator-checkpoint-v4"
MANIFEST_FILE = "manifest.json"
# Numpy's names of what is stored, and those of safetensors. bf16 never is.
DTYPES = {"float32": "F32", "float64": "F64", "int32": "I32", "int64": "I64", "uint8": "U8", "bool": "BOOL"}

_NAME = re.compile(r"step-(\d{8,})-(\d{6,})-(\d{6,})")


@dataclass(frozen=True)
class ShardPart:
    """Elements [start, stop) of a flattened tensor, stored in `file` under `key` as a one-dimensional array."""

    file: str
    key: str
    start: int
    stop: int


@dataclass(frozen=True)
class ShardHeader:
    """Header of a rank's file: the tensor of each of its pieces, and from rank 0 all state that is not a tensor."""

    parts: tuple[tuple[str, ShardPart], ...]
    meta: Mapping[str, object] | None = None


@dataclass(frozen=True)
class TensorEntry:
    """One tensor. `pieces` are in the order of their elements and cover each element once."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[ShardPart, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class FileEntry:
    """A file. `header_sha256` is the digest of its header, which has those of its blocks."""

    header_sha256: str
    num_bytes: int


@dataclass(frozen=True)
class CheckpointManifest:
    """A whole checkpoint.

    `meta` holds all state that is not a tensor: sampler position, optimizer step. (term, generation) identify the
    writing generation, with the term of its plan.
    """

    run_id: str
    step: int
    term: int
    generation: int
    tensors: Mapping[str, TensorEntry]
    files: Mapping[str, FileEntry]
    meta: Mapping[str, object] = field(default_factory=dict)
    format: str = FORMAT

    @property
    def name(self) -> str:
        """Of the checkpoint's directory."""
        return checkpoint_name(self.step, self.term, self.generation)

    @property
    def experts(self) -> ExpertSet | None:
        """The experts of each MoE layer of its model; None: those of its run's job."""
        found = self.meta.get("experts")
        if not isinstance(found, dict):
            return None
        return ExpertSet(int(found["num_experts"]), tuple(tuple(families) for families in found["families"]))

    @property
    def digest(self) -> str:
        """SHA-256 of its file, by which the run's journal names it."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def check(self) -> None:
        """Raises CheckpointCorrupt unless the pieces cover every tensor exactly once and lie in listed files."""
        for name in self.files:
            if not name or "/" in name or name.startswith("."):
                raise self._corrupt(f"names the file {name!r}; a file name has no folder and no leading dot")
        for name, tensor in self.tensors.items():
            if fault := _coverage_fault(tensor, self.files):
                raise self._corrupt(f"has tensor {name!r} {fault}")

    def to_json(self) -> str:
        """JSON with the digest of its content, so that a changed manifest is detected like a changed file."""
        body = asdict(self)
        return json.dumps({"sha256": _digest(body), "manifest": body}, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "CheckpointManifest":
        """The manifest written by `to_json`. Raises CheckpointCorrupt for anything else."""
        try:
            outer = json.loads(text)
            body, claimed = outer["manifest"], outer["sha256"]
            if body["format"] != FORMAT:
                raise CheckpointCorrupt(
                    f"{MANIFEST_FILE} has format {body['format']!r}, this version reads {FORMAT!r}",
                    remedy="Use the version that wrote it, or export its model with that one.",
                )
            if (found := _digest(body)) != claimed:
                raise CheckpointCorrupt(f"{MANIFEST_FILE} has digest {found}, its content was written as {claimed}")
            tensors = {name: _tensor_from(fields) for name, fields in body.pop("tensors").items()}
            files = {name: FileEntry(**fields) for name, fields in body.pop("files").items()}
            manifest = cls(tensors=tensors, files=files, **body)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointCorrupt(f"{MANIFEST_FILE} is not a checkpoint manifest: {error!r}") from error
        manifest.check()
        return manifest

    def _corrupt(self, fault: str) -> CheckpointCorrupt:
        return CheckpointCorrupt(f"the checkpoint of run {self.run_id!r} at step {self.step} {fault}")


def manifest_of(
    shards: Sequence[tuple[ShardWritten, ShardHeader]],
    *,
    run_id: str,
    term: int,
    shapes: Mapping[str, Sequence[int]],
    dtypes: Mapping[str, str] | None = None,
) -> CheckpointManifest:
    """Join the shards that the ranks of one generation wrote for one step.

    Args:
        term: term of the generation's plan, under which the shards were written.
        shapes: the shape of every tensor that the checkpoint must hold.
        dtypes: numpy's names; tensors without an entry are float32.

    Raises:
        ProtocolError: the shards are not of one step and generation, or disagree on `meta` or on the tensors.
        CheckpointCorrupt: the pieces don't cover every tensor exactly once.
    """
    moments = {(shard.step, shard.generation, shard.meta_sha256) for shard, _ in shards}
    if len(moments) != 1:
        raise ProtocolError(
            f"{len(shards)} shards disagree on (step, generation, meta): {sorted(moments)}",
            remedy="A checkpoint is made of the shards of one step and one generation.",
            unchanged="No checkpoint was marked complete.",
        )
    pieces: dict[str, list[ShardPart]] = {name: [] for name in shapes}
    for shard, header in shards:
        for name, part in header.parts:
            if name not in pieces:
                raise ProtocolError(f"rank {shard.rank} wrote the tensor {name!r}, of which no shape is known")
            pieces[name].append(part)
    ((step, generation, _),) = moments
    meta = next((header.meta for _, header in shards if header.meta is not None), None)
    if meta is None:
        raise ProtocolError(f"none of {len(shards)} shards holds the state that is not a tensor")
    manifest = CheckpointManifest(
        run_id=run_id,
        step=step,
        term=term,
        generation=generation,
        tensors={name: _tensor_of(shapes[name], (dtypes or {}).get(name), found) for name, found in pieces.items()},
        files={shard.file: FileEntry(shard.header_sha256, shard.num_bytes) for shard, _ in shards},
        meta=meta,
    )
    if len(manifest.files) != len(shards):
        raise ProtocolError(f"two of {len(shards)} shards name the same file: {sorted(s.file for s, _ in shards)}")
    manifest.check()
    return manifest


def checkpoint_name(step: int, term: int, generation: int) -> str:
    """Name of a checkpoint's directory; `term` is that of the generation's plan."""
    return f"step-{step:08d}-{term:06d}-{generation:06d}"


def parse_checkpoint_name(name: str) -> tuple[int, int, int] | None:
    """(step, term, generation) of a checkpoint's directory; None for any other name."""
    match = _NAME.fullmatch(name)
    return (int(match[1]), int(match[2]), int(match[3])) if match else None


def _tensor_of(shape: Sequence[int], dtype: str | None, pieces: list[ShardPart]) -> TensorEntry:
    ordered = tuple(sorted(pieces, key=lambda piece: piece.start))
    return TensorEntry(dtype=dtype or "float32", shape=tuple(shape), pieces=ordered)


def _tensor_from(fields: dict[str, object]) -> TensorEntry:
    shape, pieces = fields.pop("shape"), fields.pop("pieces")
    if not isinstance(shape, list) or not isinstance(pieces, list):
        raise TypeError("shape and pieces are lists")
    return TensorEntry(shape=tuple(shape), pieces=tuple(ShardPart(**piece) for piece in pieces), **fields)  # type: ignore[arg-type]


def _coverage_fault(tensor: TensorEntry, files: Mapping[str, FileEntry]) -> str:
    """The first fault of a tensor's pieces; empty if they cover its elements exactly once."""
    if tensor.dtype not in DTYPES:
        return f"of dtype {tensor.dtype!r}, stored are {', '.join(DTYPES)}"
    covered = 0
    for piece in tensor.pieces:
        if piece.file not in files:
            return f"in the file {piece.file!r}, which is not listed"
        if not piece.start < piece.stop:
            return f"with the empty piece [{piece.start}, {piece.stop})"
        if piece.start != covered:
            lack = "nowhere" if piece.start > covered else "twice"
            low, high = sorted((covered, piece.start))
            return f"whose elements [{low}, {high}) are stored {lack}"
        covered = piece.stop
    if covered != tensor.numel:
        return f"covered up to element {covered} of {tensor.numel}"
    return ""


def _digest(body: object) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
