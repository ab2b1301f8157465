"""Reading of a checkpoint: its manifest, element ranges of its tensors, verification of all that it holds."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from hashlib import sha256
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from orchestrator.checkpoint.manifest import MANIFEST_FILE, CheckpointManifest, ShardPart
from orchestrator.checkpoint.stored_shard import ArrayPart, StoredShard, open_shard
from orchestrator.errors import CheckpointCorrupt, NotFound
from orchestrator.storage.backends.location import Location, objects_at

TensorRange = tuple[str, int, int]  # a tensor's name, and elements [start, stop) of it


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
        raise CheckpointCorrupt(f"{path} belongs to {manifest.name}, which is not the name of its directory")
    return manifest


class CheckpointReader:
    """Reads any element range of any tensor, independent of the world that wrote it. A context manager.

    Files are opened on first use. Only the blocks that hold the requested ranges are read, and each one is compared
    with its digest: the run's journal has that of the manifest, which has those of the files' headers, which have those
    of the blocks.

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
            CheckpointCorrupt: a file is missing, or isn't what was written.
            OSError: a file can't be read.
        """
        pieces = list(self._pieces(tensor, start, stop))
        out = np.empty(stop - start, dtype=self.manifest.tensors[tensor].dtype)
        for piece, begin, end in pieces:
            part = _part(piece, begin, end)
            values = self._shard(piece.file).read(part.key, part.length, part.start, part.stop)
            out[begin - start : end - start] = self._checked(values, tensor, piece)
        return out

    def read_all(self, ranges: Iterable[TensorRange]) -> Iterator[tuple[int, int, npt.NDArray[Any]]]:
        """Yield the elements of many ranges in the order in which files have them: from a bucket that takes far fewer
        requests than one range after the other.

        Returns:
            (index of the range, the element of the tensor that the values begin with, values). A range may come in
            several parts, with others between them. Values stay until the next ones are asked for. Raises as `read`.
        """
        files: dict[str, list[tuple[int, str, ShardPart, ArrayPart]]] = {}
        for index, (tensor, start, stop) in enumerate(ranges):
            for piece, begin, end in self._pieces(tensor, start, stop):
                files.setdefault(piece.file, []).append((index, tensor, piece, _part(piece, begin, end)))
        for file, parts in files.items():
            for number, element, values in self._shard(file).read_all([part for *_, part in parts]):
                index, tensor, piece, _ = parts[number]
                yield index, piece.start + element, self._checked(values, tensor, piece)

    def check_sizes(self) -> None:
        """Raise CheckpointCorrupt for a file that is missing or has another size than was written. None is read."""
        sizes = {found.key: found.num_bytes for found in objects_at(self.path).objects("")}
        for name, entry in self.manifest.files.items():
            if name not in sizes:
                raise CheckpointCorrupt(f"{self.path}: {name} is missing; it had {entry.num_bytes} bytes")
            if sizes[name] != entry.num_bytes:
                raise CheckpointCorrupt(
                    f"{self.path}: {name} has {sizes[name]} bytes, it was written with {entry.num_bytes}"
                )

    def verify(self) -> None:
        """Compare every file with its digests. Raises CheckpointCorrupt with the file and both digests."""
        self.check_sizes()
        for name in self.manifest.files:
            self._shard(name).verify()

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _pieces(self, tensor: str, start: int, stop: int) -> Iterator[tuple[ShardPart, int, int]]:
        """The pieces that hold elements [start, stop) of a tensor, each with its elements of them. Raises as `read`."""
        entry = self.manifest.tensors.get(tensor)
        if entry is None:
            raise NotFound(f"{self.path} holds no tensor {tensor!r}", remedy="It was written for another model.")
        if not 0 <= start <= stop <= entry.numel:
            raise ValueError(f"[{start}, {stop}) lies outside of {tensor!r}, which has {entry.numel} elements")
        index = bisect_right(self._starts[tensor], start) - 1
        while start < stop:
            piece = entry.pieces[index]
            yield piece, start, min(stop, piece.stop)
            start, index = piece.stop, index + 1

    def _checked(self, values: npt.NDArray[Any], tensor: str, piece: ShardPart) -> npt.NDArray[Any]:
        if values.dtype != self.manifest.tensors[tensor].dtype:
            wanted = self.manifest.tensors[tensor].dtype
            raise CheckpointCorrupt(f"{self.path / piece.file}: {piece.key} holds {values.dtype}, not {wanted}")
        return values

    def _shard(self, file: str) -> StoredShard:
        if file not in self._files:
            self._files[file] = open_shard(self.path, file, self.manifest.files[file], len(self.manifest.files))
        return self._files[file]


def _part(piece: ShardPart, start: int, stop: int) -> ArrayPart:
    """Elements [start, stop) of a tensor, as a part of the array that holds its piece."""
    return ArrayPart(piece.key, piece.stop - piece.start, start - piece.start, stop - piece.start)
