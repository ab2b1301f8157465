"""Reading of a checkpoint: its manifest, element ranges of its tensors, verification of digests."""

from bisect import bisect_right
from hashlib import sha256
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from orchestrator.checkpoint.block_digests import first_difference
from orchestrator.checkpoint.manifest import MANIFEST_FILE, CheckpointManifest, ShardPart
from orchestrator.checkpoint.stored_shard import StoredShard, open_shard, stored_digests
from orchestrator.errors import CheckpointCorrupt, NotFound
from orchestrator.storage.backends.location import Location, objects_at


def read_manifest(checkpoint: Location, digest: str | None = None) -> CheckpointManifest:
    """The manifest of a complete checkpoint.

    Args:
        digest: SHA-256 that its file must have; None for any.

    Raises:
        CheckpointCorrupt: it is missing, was changed, or has another format.
    """
    path = checkpoint / MANIFEST_FILE
    try:
        content = objects_at(checkpoint).get(MANIFEST_FILE)
        if digest is not None and (found := sha256(content).hexdigest()) != digest:
            raise CheckpointCorrupt(f"it has sha256 {found}, the run's journal names it with {digest}")
        manifest = CheckpointManifest.from_json(content.decode())
    except FileNotFoundError as error:
        raise CheckpointCorrupt(f"{path} is missing; a checkpoint has a manifest") from error
    except CheckpointCorrupt as error:
        raise CheckpointCorrupt(f"{path} can't be trusted: {error.message}", remedy=error.remedy) from error
    except UnicodeDecodeError as error:
        raise CheckpointCorrupt(f"{path} can't be trusted: {error}") from error
    if manifest.name != checkpoint.name:
        raise CheckpointCorrupt(f"{path} is of {manifest.name}, as its directory is not named")
    return manifest


class CheckpointReader:
    """Reads any element range of any tensor, independent of the world that wrote it. A context manager.

    Files are opened on first use; only the requested ranges are read.

    Args:
        digest: as in `read_manifest`.

    Raises:
        CheckpointCorrupt: the manifest can't be trusted.
    """

    def __init__(self, checkpoint: Location, digest: str | None = None) -> None:
        self.path = checkpoint
        self.manifest = read_manifest(checkpoint, digest)
        self._starts = {
            name: [piece.start for piece in tensor.pieces] for name, tensor in self.manifest.tensors.items()
        }
        self._files: dict[str, StoredShard] = {}

    def read(self, tensor: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Elements [start, stop) of the flattened tensor, as a new array of its dtype.

        Raises:
            NotFound: there is no such tensor.
            ValueError: the range lies outside of the tensor.
            CheckpointCorrupt: a file is missing or doesn't match the manifest.
            OSError: a file can't be read.
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
        """Digest every file. Raises CheckpointCorrupt with the file and both digests."""
        for name, entry in self.manifest.files.items():
            try:
                found = stored_digests(self.path, name)
            except (FileNotFoundError, IsADirectoryError):
                raise CheckpointCorrupt(f"{self.path}: {name} is missing; it had {entry.num_bytes} bytes") from None
            if difference := first_difference(found, entry.sha256):
                raise CheckpointCorrupt(f"{self.path}: {name}: {difference}")

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_piece(self, piece: ShardPart, start: int, stop: int, dtype: str) -> npt.NDArray[Any]:
        if piece.file not in self._files:
            self._files[piece.file] = open_shard(self.path, piece.file, len(self.manifest.files))
        shard, length = self._files[piece.file], piece.stop - piece.start
        found = shard.read(piece.key, length, start - piece.start, stop - piece.start)
        if found.dtype != dtype:
            raise CheckpointCorrupt(f"{self.path / piece.file}: {piece.key} holds {found.dtype}, not {dtype}")
        return found
