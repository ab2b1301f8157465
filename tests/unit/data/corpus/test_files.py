"""Every kind of file that holds text, and how a broken one is named."""

import gzip
import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from orchestrator.data.corpus.sources import Document, read_documents
from orchestrator.errors import DataError

ROWS = [{"body": "first text", "n": 1}, {"body": "", "n": 2}, {"body": "third, ünï", "n": 3}, {"body": None, "n": 4}]
TEXTS = {0: "first text", 2: "third, ünï"}


def _write(directory: Path, kind: str) -> Path:
    path = directory / f"rows{kind}"
    lines = "\n".join(json.dumps(row) for row in ROWS).encode() + b"\n\n"
    table = pyarrow.Table.from_pylist(ROWS)
    match kind:
        case ".jsonl":
            path.write_bytes(lines)
        case ".jsonl.gz":
            path.write_bytes(gzip.compress(lines))
        case ".parquet":
            parquet.write_table(table, path, row_group_size=2)
        case ".arrow":
            with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table, max_chunksize=3)
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".parquet", ".arrow"])
def test_each_row_is_a_text(tmp_path: Path, kind: str) -> None:
    path = _write(tmp_path, kind)
    assert list(read_documents(str(path), "body")) == [Document(f"{path.name}#{n}", text) for n, text in TEXTS.items()]


@pytest.mark.parametrize("kind", [".jsonl", ".parquet", ".arrow"])
def test_a_missing_column_is_named_with_those_that_there_are(tmp_path: Path, kind: str) -> None:
    path = _write(tmp_path, kind)
    with pytest.raises(DataError, match="no (key )?'text'; it has 'body', 'n'") as caught:
        list(read_documents(str(path)))
    assert str(path) in str(caught.value) and "data.text_key" in caught.value.remedy
    with pytest.raises(DataError, match="'n' is of type int; it must be text"):
        list(read_documents(str(path), "n"))


def test_plain_files_may_be_gzipped(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("ünï".encode()))
    assert list(read_documents(str(tmp_path / "a.txt.gz"))) == [Document("a.txt.gz#0", "ünï")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"text": "good"}\n{"text": bad}\n', r"rows.jsonl:2: not JSON"),
        ("rows.jsonl", b'["text"]\n', r"rows.jsonl:1: a JSON list"),
        ("rows.jsonl", b'{"text": "caf\xe9"}\n', r"rows.jsonl:1: not UTF-8"),
        ("rows.jsonl.gz", b"not gzip", r"rows.jsonl.gz:1: can't be read"),
        ("rows.jsonl", b'{"text": "\\ud800"}\n', r"rows.jsonl:1: half of a surrogate pair at character 0"),
        ("rows.parquet", b"not parquet", r"rows.parquet:1: no parquet file"),
        ("rows.arrow", b"not arrow at all", r"rows.arrow:1: no arrow file"),
    ],
)
def test_what_is_broken_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_documents(str(tmp_path / name)))


def test_a_corpus_may_mix_kinds_and_counts_rows(tmp_path: Path) -> None:
    _write(tmp_path, ".parquet")
    (tmp_path / "plain.txt").write_text("plain text")
    (tmp_path / "state.json").write_text("{}")  # of no kind
    assert list(read_documents(str(tmp_path), "body")) == [
        Document("plain.txt", "plain text"),
        *(Document(f"rows.parquet#{number}", text) for number, text in TEXTS.items()),
    ]
