"""The store of rows, write side: built in a hidden directory, published by one rename."""

import hashlib
import json
import secrets
import shutil
from array import array
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.manifest import MANIFEST, SPLITS, TOKENIZER, Split, digest_file
from orchestrator.data.rows.row_store import (
    FORMAT_VERSION,
    ROWS_DTYPE,
    ArrayColumn,
    RowCounts,
    RowManifest,
    offsets_file,
    rows_file,
    values_file,
)
from orchestrator.data.tokenizer import TextTokenizer
from orchestrator.errors import DataError, DataNotWritten
from orchestrator.storage.atomic import flush

PREFIX = "rows-"  # of the names of stores
KINDS = "biuf"  # of numpy's dtypes: booleans, integers, floats
NAME = r"letters, digits and _"


class RowWriter(ExitStack):
    """Writes the files of one store into an empty directory: `add` every row, then `finish`. A context manager.

    Attributes:
        digest: of the finished store.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory, self.digest = directory, ""
        self._columns: dict[str, ArrayColumn] = {}
        self._files: dict[tuple[Split, str], BinaryIO] = {}
        self._ends: dict[tuple[Split, str], array[int]] = {}
        self._rows: dict[Split, array[int]] = {split: array("q") for split in SPLITS}  # units and length of each
        self._cut: dict[Split, int] = dict.fromkeys(SPLITS, 0)

    def add(self, split: Split, row: Mapping[str, Any], where: str, units: int = 1, length: int = 1) -> None:
        """Append a row.

        Args:
            where: names the row in an error.
            units, length: see `RowStore`.

        Raises:
            DataError: it is no mapping of arrays of numbers, or differs from the first row.
        """
        arrays = arrays_of(row, where)
        if not self._columns:
            self._columns = {name: ArrayColumn(dtype=a.dtype.str, shape=a.shape) for name, a in arrays.items()}
        if arrays.keys() != self._columns.keys():
            raise _refused(f"{where} has {', '.join(arrays)}; the first row has {', '.join(self._columns)}")
        for name, values in arrays.items():
            self._fit(name, values, where)
            if (split, name) not in self._files:
                path = self._directory / values_file(split, name)
                self._files[split, name] = self.enter_context(path.open("xb"))
                self._ends[split, name] = array("q", [0])
            self._files[split, name].write(np.ascontiguousarray(values).tobytes())
            ends = self._ends[split, name]
            ends.append(ends[-1] + (values.shape[0] if values.shape else 1))
        self._rows[split].extend((units, length))

    def count_cut(self, split: Split, count: int = 1) -> None:
        """Count rows that were longer than the job takes."""
        self._cut[split] += count

    def _fit(self, name: str, values: NDArray[np.generic], where: str) -> None:
        """Widen a column's shape to that of the values; refuse those that can't be in it."""
        column = self._columns[name]
        if values.dtype.str != column.dtype:
            raise _refused(f"{name} of {where} is {values.dtype}; that of the first row is {np.dtype(column.dtype)}")
        if values.shape == column.shape:
            return
        if len(values.shape) != len(column.shape) or values.shape[1:] != column.shape[1:]:
            shape = str(column.shape).replace("None", "any")
            raise _refused(
                f"{name} of {where} has shape {values.shape}; others have {shape}: rows may differ in their first axis"
            )
        self._columns[name] = ArrayColumn(dtype=column.dtype, shape=(None, *column.shape[1:]))

    def add_file(self, name: str, content: bytes) -> None:
        """Put a further file into the store."""
        (self._directory / name).write_bytes(content)

    def finish(
        self, source: str, made_of: Mapping[str, Any], num_outputs: int, tokenizer: TextTokenizer | None = None
    ) -> None:
        """Write all other files, the manifest last, and flush everything to disk."""
        self.close()
        for split in SPLITS:
            rows_R = np.frombuffer(self._rows[split].tobytes(), ROWS_DTYPE)
            np.save(self._directory / rows_file(split), rows_R, allow_pickle=False)
            for name, column in self._columns.items():
                if (split, name) not in self._files:
                    (self._directory / values_file(split, name)).touch()
                if column.shape and column.shape[0] is None:
                    ends = np.array(self._ends.get((split, name), [0]), np.int64)
                    np.save(self._directory / offsets_file(split, name), ends, allow_pickle=False)
        if tokenizer is not None:
            tokenizer.save(self._directory / TOKENIZER)
        manifest = RowManifest(
            format_version=FORMAT_VERSION,
            kind="rows",
            source=source,
            made_of=dict(made_of),
            columns=self._columns,
            splits={
                split: RowCounts(
                    num_rows=len(rows) // 2,
                    num_units=sum(rows[::2]),
                    num_tokens=sum(rows[1::2]),
                    cut=self._cut[split],
                )
                for split, rows in self._rows.items()
            },
            num_outputs=num_outputs,
            files={path.name: digest_file(path) for path in sorted(self._directory.iterdir())},
        )
        text = manifest.model_dump_json(indent=2) + "\n"
        (self._directory / MANIFEST).write_text(text, encoding="utf-8")
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        for path in self._directory.iterdir():
            flush(path)

    def __enter__(self) -> Self:
        return self


def rows_key(made_of: Mapping[str, Any]) -> str:
    """Directory name of a store, unique for all that its rows depend on."""
    text = json.dumps({"format": FORMAT_VERSION, **made_of}, sort_keys=True)
    return PREFIX + hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def new_rows(directory: Path) -> Iterator[tuple[RowWriter, list[Path]]]:
    """A writer below `directory`, and where the name that the store is to have is put before the block ends.

    A store that another process has published under this name meanwhile stays: both have the same rows.

    Raises:
        DataNotWritten: it can't be written.
    """
    named: list[Path] = []
    partial = directory / f".rows-{secrets.token_hex(8)}"
    try:
        partial.mkdir(parents=True)
        with RowWriter(partial) as writer:
            yield writer, named
        flush(partial)
        if not named[0].exists():
            partial.rename(named[0])
            flush(directory)
    except OSError as error:
        if not (named and named[0].is_dir()):
            raise DataNotWritten(
                f"rows can't be written below {directory}: {error}",
                remedy="Make room and the directory writable.",
                unchanged="No store was written.",
            ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already if it was renamed


def arrays_of(row: Mapping[str, Any], where: str) -> dict[str, NDArray[np.generic]]:
    """A row as it is read from a store. Raises DataError if it is no mapping of arrays of numbers."""
    return {name: _array(value, name, where) for name, value in _items(row, where)}


def _items(row: Mapping[str, Any], where: str) -> list[tuple[str, Any]]:
    if not isinstance(row, Mapping) or not row:
        raise _refused(f"{where} is a {type(row).__name__}; a row must be arrays by name, as a dict")
    for name in row:
        if not isinstance(name, str) or not name.isidentifier():
            raise _refused(f"{where} has the name {name!r}; names must be of {NAME}")
    return list(row.items())


def _array(value: Any, name: str, where: str) -> NDArray[np.generic]:
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:  # lists of different lengths
        raise _refused(f"{name} of {where} is no array: {error}") from error
    if array.dtype.kind not in KINDS:
        raise _refused(f"{name} of {where} is of type {type(value).__name__}; it must be an array of numbers")
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def _refused(message: str) -> DataError:
    return DataError(message, remedy="Correct the rows.", unchanged="No store was written.")
