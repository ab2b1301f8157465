"""Rows of files, as values by name: JSON lines, Parquet, and data sets saved by the `datasets` library."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from orchestrator.data.corpus.files import ROWS_AT_ONCE
from orchestrator.data.corpus.sources import find_files
from orchestrator.errors import DataError

ENDINGS = (".jsonl", ".jsonl.gz", ".parquet", ".arrow")


class FileRow(NamedTuple):
    """A row, its id, and where it is for a message."""

    id: str
    where: str
    values: dict[str, Any]


def read_rows(source: str) -> Iterator[FileRow]:
    """The rows of a source in a fixed order.

    Args:
        source: a file, or a folder of files.

    Raises:
        DataError: no such source, a file that can't be read, or no row at all.
    """
    root, files = find_files(source)
    files = tuple(path for path in files if path.name.endswith(ENDINGS))
    is_empty = True
    for path in files:
        name = path.relative_to(root).as_posix()
        for number, values in enumerate(_rows_of(path)):
            is_empty = False
            yield FileRow(f"{name}#{number}", f"{path}:{number + 1}", values)
    if is_empty:
        raise DataError(
            f"data.source {source} has no row: {len(files)} files of {', '.join(ENDINGS)}",
            remedy="Name a file or a folder with rows.",
            unchanged="Nothing was written.",
        )


def _rows_of(path: Path) -> Iterator[dict[str, Any]]:
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _lines(path)
    return _columns(path)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _object(path, number, line)
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


def _columns(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with pyarrow.memory_map(str(path)) as source:
            if path.suffix == ".parquet":
                with parquet.ParquetFile(source, pre_buffer=False) as file:
                    for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
                        yield from batch.to_pylist()
            else:  # `datasets` writes a stream of batches
                with pyarrow.ipc.open_stream(source) as stream:
                    for batch in stream:
                        yield from batch.to_pylist()
    except (pyarrow.lib.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path} can't be read: {' '.join(str(error).split())}", remedy="Mend it.", unchanged="Nothing was written."
    )
