"""Reading of checkpoints: listing, element ranges of tensors, verification of digests, deletion of old ones."""

import shutil
from bisect import bisect_right
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from orchestrator.checkpoint.block_digests import digests_of, first_difference
from orchestrator.checkpoint.manifest import (
    MANIFEST_FILE,
    CheckpointManifest,
    ShardPart,
    parse_incomplete_name,
    parse_step_name,
)
from orchestrator.errors import CheckpointCorrupt, NotFound

DISCARDED_PREFIX = ".discarded-"  # renamed before deletion, so that a half-deleted checkpoint is never listed
SUPERSEDED_PREFIX = ".superseded-"  # complete, of steps that a run went back behind


def list_checkpoints(checkpoints: Path) -> tuple[Path, ...]:
    """The complete checkpoints in a run's directory of checkpoints, oldest step first. Files are not read."""
    if not checkpoints.is_dir():
        return ()
    found = ((parse_step_name(path.name), path) for path in checkpoints.iterdir())
    return tuple(path for _, path in sorted((step, path) for step, path in found if step is not None))


def list_steps(checkpoints: Path) -> tuple[int, ...]:
    """The last finished step of each complete checkpoint, ascending."""
    return tuple(step for path in list_checkpoints(checkpoints) if (step := parse_step_name(path.name)) is not None)


def read_manifest(checkpoint: Path) -> CheckpointManifest:
    """The manifest of a complete checkpoint. Raises CheckpointCorrupt if it is missing or was changed."""
    path = checkpoint / MANIFEST_FILE
    try:
        manifest = CheckpointManifest.from_json(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointCorrupt(f"{path} is missing; a checkpoint has a manifest") from error
    except (CheckpointCorrupt, UnicodeDecodeError) as error:
        raise CheckpointCorrupt(f"{path} can't be trusted: {error}") from error
    if manifest.step != parse_step_name(checkpoint.name):
        raise CheckpointCorrupt(f"{path} is of step {manifest.step}, not of the step its directory names")
    return manifest


class CheckpointReader:
    """Reads any element range of any tensor, independent of the world that wrote it. A context manager.

    Files are mapped into memory on first use; only the requested ranges are read.

    Raises:
        CheckpointCorrupt: the manifest can't be trusted.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.path = checkpoint
        self.manifest = read_manifest(checkpoint)
        self._starts = {
            name: [piece.start for piece in tensor.pieces] for name, tensor in self.manifest.tensors.items()
        }
        self._files: dict[str, safe_open] = {}

    def read(self, tensor: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Elements [start, stop) of the flattened tensor, as a new array of its dtype.

        Raises:
            NotFound: there is no such tensor.
            ValueError: the range lies outside of the tensor.
            CheckpointCorrupt: a file is missing or doesn't match the manifest.
        """
        entry = self.manifest.tensors.get(tensor)
        if entry is None:
            raise NotFound(f"{self.path} holds no tensor {tensor!r}", remedy="It was written for another model.")
        if not 0 <= start <= stop <= entry.numel:
            raise ValueError(f"[{start}, {stop}) lies outside of {tensor!r}, which has {entry.numel} elements")
        out = np.empty(stop - start, dtype=entry.dtype)
        at = start
        index = bisect_right(self._starts[tensor], start) - 1
        while at < stop:
            piece = entry.pieces[index]
            until = min(stop, piece.stop)
            out[at - start : until - start] = self._read_piece(piece, at, until, entry.dtype)
            at, index = until, index + 1
        return out

    def verify(self) -> None:
        """Digest every file. Raises CheckpointCorrupt with the file, both digests and the previous good checkpoint."""
        if fault := self._fault():
            good = _previous_good(self.path)
            remedy = (
                f"The newest good checkpoint before it is {good}" if good else "There is no good checkpoint before it"
            )
            raise CheckpointCorrupt(f"{self.path}: {fault}", remedy=remedy, unchanged="Nothing was deleted.")

    def close(self) -> None:
        """Unmap the files."""
        self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_piece(self, piece: ShardPart, start: int, stop: int, dtype: str) -> npt.NDArray[Any]:
        try:
            stored = self._open(piece.file).get_slice(piece.key)  # type: ignore[no-untyped-call]
            if stored.get_shape() != [piece.stop - piece.start]:
                raise CheckpointCorrupt(f"{self.path / piece.file}: {piece.key} has shape {stored.get_shape()}")
            found: npt.NDArray[Any] = stored[start - piece.start : stop - piece.start]
        except (SafetensorError, OSError) as error:
            raise CheckpointCorrupt(f"{self.path / piece.file} can't be read: {error}") from error
        if found.dtype != dtype:
            raise CheckpointCorrupt(f"{self.path / piece.file}: {piece.key} holds {found.dtype}, not {dtype}")
        return found

    def _open(self, file: str) -> safe_open:
        if file not in self._files:
            self._files[file] = safe_open(self.path / file, framework="numpy")
        return self._files[file]

    def _fault(self) -> str:
        """The first fault of the files; empty if there is none. The manifest itself was checked when it was read."""
        for name, entry in self.manifest.files.items():
            path = self.path / name
            if not path.is_file():
                return f"{name} is missing; it had {entry.num_bytes} bytes"
            if difference := first_difference(digests_of(path), entry.sha256):
                return f"{name}: {difference}"
        return ""


def choose(checkpoints: Path, step: int | None = None) -> Path | None:
    """The checkpoint to resume from, with verified digests: that of `step`, or the newest. None without checkpoints.

    Raises:
        NotFound: there is none of `step`; the message lists the steps with one.
        CheckpointCorrupt: its files were changed; the message names the previous good checkpoint.
    """
    found = list_checkpoints(checkpoints)
    if step is not None:
        wanted = [path for path in found if parse_step_name(path.name) == step]
        if not wanted:
            steps = ", ".join(str(parse_step_name(path.name)) for path in found) or "none"
            raise NotFound(
                f"{checkpoints} holds no checkpoint of step {step}; it holds {steps}",
                remedy="Name one of these steps, or none for the newest.",
                unchanged="Nothing was started.",
            )
        found = tuple(wanted)
    if not found:
        return None
    with CheckpointReader(found[-1]) as reader:
        reader.verify()
    return found[-1]


def set_aside(checkpoints: Path, after_step: int, mark: str, before: tuple[int, int] | None = None) -> tuple[Path, ...]:
    """Hide the complete checkpoints after `after_step`, under names with `mark`: the run went back to an earlier step.

    Args:
        before: only those by a lower (term, generation), or with a manifest that can't be trusted; None for all.

    Returns:
        their new paths; nothing is deleted.
    """
    hidden = []
    for path in list_checkpoints(checkpoints):
        step = parse_step_name(path.name)
        if step is not None and step > after_step and (before is None or _age(path)[:2] < before):
            hidden.append(path.rename(path.with_name(f"{SUPERSEDED_PREFIX}{mark}-{path.name}")))
    return tuple(hidden)


def prune(checkpoints: Path, keep_last: int, keep_steps: Collection[int] = ()) -> tuple[Path, ...]:
    """Delete all but the `keep_last` newest checkpoints and those of `keep_steps`, and abandoned unfinished ones.

    Only the run's controller calls this. An unfinished checkpoint is abandoned once a later one of the same or a later
    (term, generation) is complete.

    Returns:
        the complete checkpoints that were deleted.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last is {keep_last}; at least the newest checkpoint is kept")
    complete = list_checkpoints(checkpoints)
    kept = complete[-keep_last:]
    dropped = tuple(p for p in complete[:-keep_last] if parse_step_name(p.name) not in keep_steps)
    for path in dropped:
        discard(path)
    newest = max((_age(path) for path in kept), default=(-1, -1, -1))
    for path in checkpoints.iterdir() if checkpoints.is_dir() else ():
        unfinished = parse_incomplete_name(path.name)
        if unfinished and (unfinished[1], unfinished[2], unfinished[0]) < newest:
            discard(path)
        elif path.name.startswith(DISCARDED_PREFIX):
            shutil.rmtree(path)
    return dropped


def _age(checkpoint: Path) -> tuple[int, int, int]:
    """(term, generation, step); lower than any other if the manifest can't be trusted."""
    try:
        manifest = read_manifest(checkpoint)
    except CheckpointCorrupt:
        return (-1, -1, -1)
    return (manifest.term, manifest.generation, manifest.step)


def discard(path: Path) -> None:
    """Delete a checkpoint. It disappears from the list at once; one that is deleted in part is never listed."""
    hidden = path.with_name(DISCARDED_PREFIX + path.name)
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden)


def _previous_good(checkpoint: Path) -> Path | None:
    complete = list_checkpoints(checkpoint.parent)
    earlier = complete[: complete.index(checkpoint)]
    return next((path for path in reversed(earlier) if _is_good(path)), None)


def _is_good(checkpoint: Path) -> bool:
    try:
        with CheckpointReader(checkpoint) as reader:
            return not reader._fault()
    except CheckpointCorrupt:
        return False
