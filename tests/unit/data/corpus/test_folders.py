"""Folders as the `datasets` library saves them: which files are read, in which order."""

import json
from pathlib import Path

import pyarrow
import pytest

from orchestrator.data.corpus.files import text_files
from orchestrator.data.corpus.sources import read_documents
from orchestrator.errors import DataError


def _save(folder: Path, shards: dict[str, list[str]]) -> Path:
    """What `Dataset.save_to_disk` leaves: an Arrow stream per shard, and JSON files that are no text."""
    folder.mkdir(parents=True)
    for name, texts in shards.items():
        table = pyarrow.table({"text": texts})
        with pyarrow.OSFile(str(folder / name), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
    state = {"_data_files": [{"filename": name} for name in shards], "_fingerprint": "0", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {"text": {"dtype": "string"}}}))
    return folder


def _texts(folder: Path) -> list[str]:
    return [document.text for document in read_documents(str(folder))]


def test_shards_are_read_in_the_order_that_the_state_names(tmp_path: Path) -> None:
    saved = _save(tmp_path / "set", {"data-2.arrow": ["one", "two"], "data-10.arrow": ["three"], "a.arrow": ["four"]})
    assert _texts(saved) == ["one", "two", "three", "four"]


def test_what_map_and_filter_leave_beside_them_is_not_read(tmp_path: Path) -> None:
    saved = _save(tmp_path / "set", {"data-00000-of-00001.arrow": ["one"]})
    (saved / "cache-0123456789abcdef.arrow").write_bytes((saved / "data-00000-of-00001.arrow").read_bytes())
    assert _texts(saved) == ["one"]
    assert _texts(tmp_path) == ["one"]  # from further up too


def test_of_several_splits_train_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "sets"
    _save(folder / "train", {"data-00000-of-00001.arrow": ["to train on"]})
    _save(folder / "test", {"data-00000-of-00001.arrow": ["not to train on"]})
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    assert _texts(folder) == ["to train on"]
    assert _texts(folder / "test") == ["not to train on"]


def test_splits_without_train_are_named(tmp_path: Path) -> None:
    _save(tmp_path / "en", {"data-00000-of-00001.arrow": ["text"]})
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["en", "de"]}))
    with pytest.raises(DataError, match="holds the data sets en, de; none is called train"):
        text_files(tmp_path)


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    saved = _save(tmp_path / "set", {"data-0.arrow": ["one"], "data-1.arrow": ["two"]})
    (saved / "data-1.arrow").unlink()
    with pytest.raises(DataError, match=r"state.json names data-1.arrow, which isn't there"):
        text_files(saved)


@pytest.mark.parametrize("content", ["{}", "[1]", "no JSON", '{"_data_files": [1]}'])
def test_a_state_file_of_another_program_means_nothing(tmp_path: Path, content: str) -> None:
    saved = _save(tmp_path / "set", {"data-0.arrow": ["one"]})
    (saved / "state.json").write_text(content)
    assert _texts(saved) == ["one"]
