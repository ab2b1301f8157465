"""Rows of arrays: what is written is read, and what doesn't fit is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.data.rows.row_store import RowStore
from orchestrator.data.rows.row_writer import RowWriter, new_rows
from orchestrator.errors import DataError, StoreCorrupt

ROWS: list[dict[str, Any]] = [
    {"image": np.full((2, 3), n, np.float32), "label": n, "tokens": np.arange(n + 1, dtype=np.int32)} for n in range(7)
]


def _written(directory: Path, rows: list[dict[str, Any]], name: str = "store") -> RowStore:
    with new_rows(directory) as (writer, named):
        for number, row in enumerate(rows):
            split = "validation" if number == 3 else "train"
            writer.add(split, row, f"row {number}", units=number, length=number + 1)  # type: ignore[arg-type]
        writer.add_file("more.txt", b"more")
        writer.finish("test", {"by": "a test"}, 7)
        named.append(directory / name)
    return RowStore.open(named[0], verify=True)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    store = _written(tmp_path, ROWS)
    train = [row for number, row in enumerate(ROWS) if number != 3]
    assert (store.num_rows("train"), store.num_rows("validation")) == (6, 1)
    for number, row in zip((5, 0, 3), store.read("train", np.array([5, 0, 3])), strict=True):
        assert set(row) == {"image", "label", "tokens"}
        assert all(np.array_equal(row[name], train[number][name]) for name in row)
        assert row["image"].dtype == np.float32 and row["tokens"].dtype == np.int32
    assert store.units("train", np.array([0, 3])).tolist() == [0, 4]
    assert store.lengths("validation", np.array([0])).tolist() == [4]
    assert store.read("validation", np.array([], np.int64)) == []
    assert store.further_files == ("more.txt",)
    with pytest.raises(ValueError, match="rows 1 to 6 were asked for; train has 6"):
        store.read("train", np.array([1, 6]))


def test_columns_that_differ_later_only_are_of_any_length(tmp_path: Path) -> None:
    store = _written(tmp_path, [{"x": [1.0, 2.0]}] * 3 + [{"x": [3.0, 4.0, 5.0]}, {"x": []}])
    assert [row["x"].tolist() for row in store.read("train", np.arange(4))] == [[1.0, 2.0]] * 3 + [[]]
    assert store.read("validation", np.array([0]))[0]["x"].tolist() == [3.0, 4.0, 5.0]


def test_a_row_unlike_the_first_is_found_in_any_split(tmp_path: Path) -> None:
    assert _written(tmp_path, ROWS, "of any length").unlike_first() == ("train", 1)
    alike = [{"x": [1.0, 2.0]}] * 3
    assert _written(tmp_path, alike, "alike").unlike_first() is None
    assert _written(tmp_path, [*alike, {"x": [3.0]}], "validation").unlike_first() == ("validation", 0)
    assert _written(tmp_path, [*alike, *alike[:1], {"x": []}], "last").unlike_first() == ("train", 3)


WRONG: dict[str, tuple[Any, str]] = {
    "no mapping": ([1, 2], "row 1 is a list; a row must be arrays by name"),
    "another name": ({"y": 1.0}, "row 1 has y; the first row has x"),
    "text": ({"x": "abc"}, "x of row 1 is of type str; it must be an array of numbers"),
    "ragged": ({"x": [[1.0], [1.0, 2.0]]}, "x of row 1 is no array: .*inhomogeneous"),
    "another type": ({"x": np.zeros((2, 2), np.int32)}, "x of row 1 is int32; that of the first row is float64"),
    "another shape": ({"x": np.zeros((2, 3))}, r"x of row 1 has shape \(2, 3\); others have \(2, 2\)"),
    "a name that is none": ({"a b": 1.0}, "row 1 has the name 'a b'"),
}


@pytest.mark.parametrize(("row", "message"), WRONG.values(), ids=WRONG.keys())
def test_rows_that_do_not_fit_are_refused_and_nothing_is_left(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        _written(tmp_path, [{"x": np.zeros((2, 2))}, row])
    assert list(tmp_path.iterdir()) == []


def test_an_existing_store_stays(tmp_path: Path) -> None:
    first = _written(tmp_path, ROWS)
    assert _written(tmp_path, ROWS).digest == first.digest
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_damage_is_found(tmp_path: Path) -> None:
    store = _written(tmp_path, ROWS)
    values = store.directory / "train.label.values"
    values.write_bytes(values.read_bytes()[:-1] + b"\x07")
    RowStore.open(store.directory)
    with pytest.raises(StoreCorrupt, match="train.label.values has sha256"):
        RowStore.open(store.directory, verify=True)
    values.write_bytes(b"")
    with pytest.raises(StoreCorrupt):
        RowStore.open(store.directory)
    with pytest.raises(DataError, match="is no store of rows"):
        RowStore.open(tmp_path)


def test_a_split_without_rows_is_empty(tmp_path: Path) -> None:
    with new_rows(tmp_path) as (writer, named):
        writer.add("train", {"x": [1.0]}, "row 0")
        writer.finish("test", {}, 0)
        named.append(tmp_path / "one")
    store = RowStore.open(tmp_path / "one")
    assert store.num_rows("validation") == 0 and store.read("train", np.array([0]))[0]["x"].tolist() == [1.0]
    assert isinstance(writer, RowWriter) and writer.digest == store.digest
