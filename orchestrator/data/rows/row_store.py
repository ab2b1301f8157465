"""A store of rows of arrays: what tasks other than language modeling of one text train on.

    STORE/manifest.json              a `RowManifest`, written last
    STORE/SPLIT.rows.npy             one ROWS_DTYPE record per row
    STORE/SPLIT.COLUMN.values        the column's elements, row after row: little-endian, nothing else
    STORE/SPLIT.COLUMN.offsets.npy   (rows + 1) int64: where each row begins; only where rows differ in their first axis
    STORE/tokenizer.json             of chats: the tokenizer that made the tokens; chat_template.json: their template

Rows are copied here once, from wherever they came, so any worker on any node can read any row, and its digest shows
that all of them read the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from orchestrator.data.manifest import MANIFEST, FileDigest, Split, digest_file
from orchestrator.data.store import check_file, mapped_array, read_manifest

FORMAT_VERSION: Literal[1] = 1
ROWS_DTYPE = np.dtype([("units", "<i8"), ("length", "<i8")])
Ints: TypeAlias = NDArray[np.int64]
Row: TypeAlias = Mapping[str, NDArray[np.generic]]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ArrayColumn(_Record):
    """Arrays of one name. `shape` is that of each row; its first axis is None where rows differ in it."""

    dtype: str
    shape: tuple[int | None, ...]


class RowCounts(_Record):
    """What a split has. `cut` rows were longer than the longest that the job takes."""

    num_rows: int
    num_units: int
    num_tokens: int
    cut: int = 0


class RowManifest(_Record):
    """The content of `manifest.json`. `files` names every other file of the store; `made_of` all that rows depend
    on."""

    format_version: Literal[1]
    kind: Literal["rows"]
    source: str
    made_of: dict[str, Any]
    columns: dict[str, ArrayColumn]
    splits: dict[Split, RowCounts]
    num_outputs: int  # tokens of the vocabulary, or classes; 0 if rows don't have any
    files: dict[str, FileDigest]


@dataclass(frozen=True, eq=False)
class _SplitColumn:
    values: NDArray[np.generic]
    shape: tuple[int | None, ...]
    offsets: Ints | None

    def row(self, number: int) -> NDArray[np.generic]:
        if self.offsets is None:
            return np.asarray(self.values[number])
        start, stop = self.offsets[number : number + 2]
        return np.asarray(self.values[start:stop])


class RowStore:
    """A store, opened with `RowStore.open`.

    Attributes:
        directory: on this machine.
        digest: sha256 of the manifest, which covers everything in the store.
    """

    def __init__(self, directory: Path, manifest: RowManifest, digest: str) -> None:
        self.directory, self.manifest, self.digest = directory, manifest, digest
        self._rows = {split: mapped_array(directory / rows_file(split)) for split in manifest.splits}
        self._columns = {
            split: {name: _column(directory, split, name, column) for name, column in manifest.columns.items()}
            for split in manifest.splits
        }

    @classmethod
    def open(cls, directory: Path, verify: bool = False) -> "RowStore":
        """Open a store, memory-mapped, after checking the sizes of its files; with `verify`, their digests too.

        Raises:
            DataError: there is no store.
            StoreCorrupt: a file doesn't match the manifest.
        """
        manifest = read_manifest(directory, RowManifest, "store of rows")
        for name, recorded in manifest.files.items():
            check_file(directory / name, recorded, verify)
        return cls(directory, manifest, digest_file(directory / MANIFEST).sha256)

    def num_rows(self, split: Split) -> int:
        return len(self._rows[split]) if split in self._rows else 0

    def units(self, split: Split, rows_R: Ints) -> Ints:
        """Units of each row, over which the loss is a mean: target tokens of a chat, else 1."""
        return np.asarray(self._rows[split]["units"][self._checked(split, rows_R)], np.int64)

    def lengths(self, split: Split, rows_R: Ints) -> Ints:
        """Tokens of each row, by which micro-batches are filled; 1 where rows have none."""
        return np.asarray(self._rows[split]["length"][self._checked(split, rows_R)], np.int64)

    def read(self, split: Split, rows_R: Ints) -> Sequence[Row]:
        """The rows with these numbers, in this order. Raises ValueError for a row that doesn't exist."""
        columns = self._columns[split]
        numbers = self._checked(split, rows_R).tolist()
        return [{name: column.row(number) for name, column in columns.items()} for number in numbers]

    def unlike_first(self) -> tuple[Split, int] | None:
        """A row that differs in its shapes from the first one of `train`; None: there is none."""
        for name, column in self._columns["train"].items():
            for split, columns in self._columns.items():
                offsets = columns[name].offsets
                if column.offsets is not None and offsets is not None:
                    others = np.flatnonzero(np.diff(offsets) != column.offsets[1] - column.offsets[0])
                    if len(others):
                        return split, int(others[0])
        return None

    @property
    def further_files(self) -> tuple[str, ...]:
        """Names of the files that hold no rows."""
        splits = tuple(f"{split}." for split in self.manifest.splits)
        return tuple(name for name in self.manifest.files if not name.startswith(splits))

    def _checked(self, split: Split, rows_R: Ints) -> Ints:
        rows_R = np.asarray(rows_R, np.int64)
        if rows_R.size and not 0 <= rows_R.min() <= rows_R.max() < self.num_rows(split):
            raise ValueError(
                f"rows {rows_R.min()} to {rows_R.max()} were asked for; {split} has {self.num_rows(split)}"
            )
        return rows_R


def rows_file(split: Split) -> str:
    return f"{split}.rows.npy"


def values_file(split: Split, column: str) -> str:
    return f"{split}.{column}.values"


def offsets_file(split: Split, column: str) -> str:
    return f"{split}.{column}.offsets.npy"


def _column(directory: Path, split: Split, name: str, column: ArrayColumn) -> _SplitColumn:
    path, tail = directory / values_file(split, name), tuple(size or 0 for size in column.shape[1:])
    num_bytes, dtype = path.stat().st_size, np.dtype(column.dtype)
    flat = np.memmap(path, dtype, "r") if num_bytes else np.empty(0, dtype)
    if column.shape and column.shape[0] is None:
        offsets = mapped_array(directory / offsets_file(split, name))
        return _SplitColumn(flat.reshape(int(offsets[-1]), *tail), column.shape, offsets)
    fixed = tuple(size or 0 for size in column.shape)
    size = int(np.prod(fixed, dtype=np.int64))
    return _SplitColumn(flat.reshape(flat.size // size if size else 0, *fixed), column.shape, None)
