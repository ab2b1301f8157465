"""Text files: plain, JSON lines, Parquet, and data sets saved by the `datasets` library.

Plain files and JSON lines may be gzipped. A plain file is one document; in the other formats each row is one.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.errors import DataError

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet", ".arrow")
KINDS = ", ".join(SUFFIXES)
ROWS_AT_ONCE = 256  # decoded rows of a Parquet file in memory


def suffix_of(path: Path) -> str | None:
    """The entry of `SUFFIXES` that a file's name ends with; None if there is none."""
    return next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)


def is_plain(path: Path) -> bool:
    return suffix_of(path) in (".txt", ".txt.gz")


def column(path: Path, text_key: str, first_row: int = 0) -> Iterator[Any]:
    """A column from `first_row` on, as arrays. The file is memory-mapped, with one array at a time in memory.

    Raises:
        DataError: there is no such column.
        pyarrow.ArrowException: the file isn't of the format that its name implies, or is damaged.
    """
    for values in _arrays(path, text_key, first_row):
        skipped = min(first_row, len(values))
        first_row -= skipped
        if skipped < len(values):
            yield values[skipped:]


def _arrays(path: Path, text_key: str, first_row: int) -> Iterator[Any]:
    """A whole column; row groups before `first_row` are not read, but replaced by nulls."""
    import pyarrow
    from pyarrow import parquet

    with pyarrow.memory_map(str(path)) as source:
        if path.suffix == ".parquet":
            with parquet.ParquetFile(source, pre_buffer=False) as file:
                _check_column(path, text_key, file.schema_arrow.names)
                group, num_groups = 0, file.metadata.num_row_groups
                while group < num_groups and (size := file.metadata.row_group(group).num_rows) <= first_row:
                    yield pyarrow.nulls(size)
                    group, first_row = group + 1, first_row - size
                groups = list(range(group, num_groups))
                for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=[text_key], row_groups=groups):
                    yield batch.column(0)
        else:  # `datasets` writes a stream of batches
            with pyarrow.ipc.open_stream(source) as stream:
                _check_column(path, text_key, stream.schema.names)
                for batch in stream:
                    yield batch.column(text_key)


def _check_column(path: Path, text_key: str, names: list[str]) -> None:
    if text_key not in names:
        raise DataError(f"{path} has no {text_key!r}; it has {', '.join(map(repr, names)) or 'nothing'}")


# -- Text files of a folder, in order; folders saved by the `datasets` library list their own --------------------------

STATE, SPLITS = "state.json", "dataset_dict.json"
TRAIN = "train"


def text_files(folder: Path) -> tuple[Path, ...]:
    """Every text file at any depth, sorted by path below the folder; files of a saved data set in its own order.

    Raises:
        DataError: a saved data set lacks a file that it names, or there are several data sets and none is `train`.
    """
    found = _found(folder)
    return tuple(sorted(found, key=lambda path: (path.parent / found[path]).relative_to(folder).as_posix()))


def _found(folder: Path) -> dict[Path, str]:
    """The files, each with the name by which it is sorted."""
    splits = _entry(folder / SPLITS, "splits")
    if splits is not None:
        if TRAIN not in splits:
            raise DataError(
                f"{folder} holds the data sets {', '.join(map(str, splits))}; none is called {TRAIN}",
                remedy="Name the folder of the one to train on in data.source.",
                unchanged="Nothing was written.",
            )
        return _found(folder / TRAIN)
    saved = _saved(folder)
    found = {} if saved is None else {path: f"{place:09d}" for place, path in enumerate(saved)}
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():  # a link may lead back up
            found |= _found(path)
        elif path.is_file() and suffix_of(path) and (saved is None or path.suffix != ".arrow"):
            found[path] = path.name
    return found


def _saved(folder: Path) -> list[Path] | None:
    """The files of the data set that is saved here, in its order; None if there is none."""
    entries = _entry(folder / STATE, "_data_files")
    if entries is None or not all(isinstance(entry, dict) and "filename" in entry for entry in entries):
        return None
    paths = [folder / str(entry["filename"]) for entry in entries]
    for path in paths:
        if not path.is_file():
            raise DataError(
                f"{folder / STATE} names {path.name}, which isn't there",
                remedy="Copy the folder as a whole, or save the data set again.",
                unchanged="Nothing was written.",
            )
    return paths


def _entry(path: Path, key: str) -> list[Any] | None:
    """The list under `key`; None without the file or list, as other programs write a state.json too."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    value = found.get(key) if isinstance(found, dict) else None
    return value if isinstance(value, list) else None
