"""Rows of files, as values by name: JSON lines, Parquet, and data sets saved by the `datasets` library."""

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from orchestrator.data.corpus.files import ROWS_AT_ONCE
from orchestrator.data.corpus.sources import find_files
from orchestrator.errors import DataError

ENDINGS = (".jsonl", ".jsonl.gz", ".parquet", ".arrow")
ALL = ("*",)  # every column


class FileRow(NamedTuple):
    """A row, its id, and where it is for a message."""

    id: str
    where: str
    values: dict[str, Any]


def read_rows(source: str, columns: Sequence[str] | None = None) -> Iterator[FileRow]:
    """The rows of a source in a fixed order.

    Args:
        source: a file, or a folder of files.
        columns: names of those that are read, or `ALL`, as arrays of the numbers' own type; None: all, as Python's
            values.

    Raises:
        DataError: no such source, a file that can't be read, or no row at all.
    """
    root, files = find_files(source)
    files = tuple(path for path in files if path.name.endswith(ENDINGS))
    is_empty = True
    for path in files:
        name = path.relative_to(root).as_posix()
        for number, (line, values) in enumerate(_rows_of(path, columns)):
            is_empty = False
            yield FileRow(f"{name}#{number}", f"{path}:{line}", values)
    if is_empty:
        raise DataError(
            f"data.source {source} has no row: {len(files)} files of {', '.join(ENDINGS)}",
            remedy="Name a file or a folder with rows.",
            unchanged="Nothing was written.",
        )


def _rows_of(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows, each with its line, from 1."""
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        for line, row in _lines(path):
            yield line, row if columns in (None, ALL) else {name: row[name] for name in columns or () if name in row}
    else:
        yield from enumerate(_columns(path, columns), 1)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _object(path, number, line)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}:{number}: not JSON: {error}", unchanged="Nothing was written.") from error
    if not isinstance(row, dict):
        raise DataError(
            f"{path}:{number}: a JSON {type(row).__name__}; each line must be an object",
            unchanged="Nothing was written.",
        )
    return row


def _columns(path: Path, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with pyarrow.memory_map(str(path)) as source:
            if path.suffix == ".parquet":
                with parquet.ParquetFile(source, pre_buffer=False) as file:
                    for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
                        yield from _values(batch, columns)
            else:  # `datasets` writes a stream of batches
                with pyarrow.ipc.open_stream(source) as stream:
                    for batch in stream:
                        yield from _values(batch, columns)
    except (pyarrow.lib.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def _values(batch: Any, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    if columns is None:
        yield from batch.to_pylist()
        return
    known = batch.schema.names
    there = known if columns == ALL else [name for name in columns if name in known]
    types = [_number_type(batch.column(name).type) for name in there]
    for row in batch.select(there).to_pylist():
        yield {name: _typed(row[name], dtype) for name, dtype in zip(there, types, strict=True)}


def _typed(value: Any, dtype: Any) -> Any:
    """The value as an array of this type; unchanged where it is none, as with nulls in it, which is refused later."""
    try:
        array = np.asarray(value)
    except ValueError:
        return value
    return value if dtype is None or array.dtype.kind not in "biuf" else array.astype(dtype)


def _number_type(kind: Any) -> Any:
    """The type of a column's numbers, however deep in lists; None for other values."""
    from pyarrow import types

    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind = kind.value_type
    return kind.to_pandas_dtype() if types.is_integer(kind) or types.is_floating(kind) else None


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path} can't be read: {' '.join(str(error).split())}",
        remedy="Correct it, or move it out of the folder.",
        unchanged="Nothing was written.",
    )
