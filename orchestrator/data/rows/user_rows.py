"""Rows of a user's own: `data: {entrypoint: "package.module:rows"}`.

    def rows(split: str, options: dict) -> Dataset | None

The function is called with `train` and with `validation`, and returns a map-style data set, which has a length and
gives a row for each number below it, as a dict of arrays by name; None for no validation.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.data.manifest import SPLITS, Split
from orchestrator.errors import DataError, EntrypointError
from orchestrator.spec.data import DataSpec
from orchestrator.spec.task import UNITS, TaskSpec
from orchestrator.user_code import calling_user, function_of

KEY = "data.entrypoint"


class UserRows:
    """The data sets of an entrypoint.

    Args:
        splits: for which it is asked.

    Raises:
        EntrypointError: it can't be imported, raises, or gives no data set.
    """

    def __init__(self, data: DataSpec, splits: Sequence[Split] = SPLITS) -> None:
        assert data.entrypoint is not None
        self._entrypoint = data.entrypoint
        function = function_of(KEY, data.entrypoint, Path(data.code_dir))
        self._sets: dict[Split, Any] = {}
        for split in splits:
            with calling_user(f"{KEY} {data.entrypoint} for {split}"):
                found = function(split, dict(data.options))
            if found is not None:
                self._sets[split] = found
        if "train" not in self._sets:
            raise self._refused("returned None for train", "Return a data set.")
        self.num_rows = {split: self._length(split) for split in self._sets}
        if self.num_rows["train"] == 0:
            raise self._refused("returned no rows for train", "Check the place from which it reads them.")

    def _length(self, split: Split) -> int:
        found = self._sets[split]
        if not hasattr(found, "__len__") or not hasattr(found, "__getitem__"):
            raise self._refused(
                f"returned a {type(found).__name__} for {split}, which has no length or no rows by number",
                "Return a map-style data set, such as a list: rows are drawn by their numbers, so that none is lost "
                "or used twice.",
            )
        with calling_user(f"len() of {KEY} {self._entrypoint} for {split}"):
            return len(found)

    def rows(self, split: Split, most: int | None = None) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """The rows of a split, each with where it is for a message; the first `most` of them."""
        for number in range(min(self.num_rows.get(split, 0), most or self.num_rows.get(split, 0))):
            where = f"row {number} of {self._entrypoint} for {split}"
            with calling_user(where):
                row = self._sets[split][number]
            yield where, row

    def _refused(self, what: str, remedy: str) -> EntrypointError:
        return EntrypointError(f"{KEY} {self._entrypoint} {what}", remedy=remedy)


def units_of(task: TaskSpec, row: Mapping[str, Any], where: str) -> int:
    """The units of a row: 1, or for a task of the user's those of its column. Raises DataError for no such number."""
    if task.entrypoint is None or not isinstance(row, Mapping) or UNITS not in row:
        return 1
    units = np.asarray(row[UNITS])
    if units.shape != () or units.dtype.kind not in "iu" or units < 1:
        raise DataError(
            f"{UNITS!r} of {where} is {row[UNITS]!r}; it must be a whole number from 1",
            remedy="Correct it, leave rows without units out, or give the column another name: this one counts units.",
            unchanged="No store was written.",
        )
    return int(units)
