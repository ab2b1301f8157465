"""The files of a folder that hold text, in order; folders that the `datasets` library saved say themselves which.

FOLDER/state.json           of one data set: its .arrow files, in the order of its rows. Others beside them are left
                            alone: `map` and `filter` leave such as cache-….arrow
FOLDER/dataset_dict.json    of several, a folder each: `train` is read. What is held out for validation is ours to
                            choose (data.holdout), and a test split is not to be trained on
"""

import json
from pathlib import Path
from typing import Any

from orchestrator.data.corpus.files import suffix_of
from orchestrator.errors import DataError

STATE, SPLITS = "state.json", "dataset_dict.json"
TRAIN = "train"


def text_files(folder: Path) -> tuple[Path, ...]:
    """Every file with text at any depth, sorted by its path below the folder; those of a saved data set in its order.

    Raises:
        DataError: a saved data set lacks a file that it names, or several have no `train` among them.
    """
    found = _found(folder)
    return tuple(sorted(found, key=lambda path: (path.parent / found[path]).relative_to(folder).as_posix()))


def _found(folder: Path) -> dict[Path, str]:
    """The files, each with the name that it is sorted by."""
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
    """The files of the data set that was saved here, in its order; None if none was."""
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
    """The list under `key`, if the file is there and has one: other programs write a state.json too."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    value = found.get(key) if isinstance(found, dict) else None
    return value if isinstance(value, list) else None
