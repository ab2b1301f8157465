"""Files as streams of records, from any record on, and faults named with their line."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from orchestrator.data.corpus.records import Form, Record, can_be_entered, form_of, records
from orchestrator.data.corpus.sources import read_documents

TEXTS = [f"{number}: naïve café\n" + "word " * (number % 7) for number in range(600)] + ["", " \n"]


def lines_of(texts: list[str]) -> bytes:
    """With blank lines between, which are no rows."""
    return b"".join(json.dumps({"text": text}).encode() + b"\n" + b"\n" * (i % 3) for i, text in enumerate(texts))


def write_jsonl(folder: Path) -> Path:
    (folder / "a.jsonl").write_bytes(lines_of(TEXTS))
    return folder / "a.jsonl"


def write_jsonl_gz(folder: Path) -> Path:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines_of(TEXTS)))
    return folder / "a.jsonl.gz"


def write_parquet(folder: Path) -> Path:
    parquet.write_table(pyarrow.table({"text": TEXTS}), folder / "a.parquet", row_group_size=64)
    return folder / "a.parquet"


def write_arrow(folder: Path) -> Path:
    table = pyarrow.table({"text": TEXTS})
    with pyarrow.OSFile(str(folder / "a.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=100)
    return folder / "a.arrow"


def write_txt(folder: Path) -> Path:
    text = "".join(f"Paragraph {number}, naïve.\n" * 90 + "\n" * (1 + number % 3) for number in range(90))
    (folder / "a.txt").write_text(text, encoding="utf-8")
    return folder / "a.txt"


def write_txt_gz(folder: Path) -> Path:
    path = write_txt(folder)
    (folder / "b.txt.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return folder / "b.txt.gz"


WRITERS = [write_jsonl, write_jsonl_gz, write_parquet, write_arrow, write_txt, write_txt_gz]
by_writer = pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__.removeprefix("write_"))


@by_writer
def test_texts_and_numbers_are_those_of_the_corpus(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    path = write(tmp_path)
    found = list(records(path, form_of(path, alone=True), "text"))
    assert [record.place.row for record in found] == list(range(len(found)))
    assert not any(record.fault for record in found)
    with_text = [record for record in found if record.text and record.text.strip()]
    assert [(document.id, document.text) for document in read_documents(str(path))] == [
        (f"{path.name}#{record.place.row}", record.text) for record in with_text
    ]


@by_writer
def test_reading_can_begin_at_any_record(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    path = write(tmp_path)
    form = form_of(path, alone=True)
    found = list(records(path, form, "text"))
    assert len(found) > 5
    for start in (0, 1, 63, 64, 65, 127, 300, len(found) - 1):
        if start < len(found):
            assert list(records(path, form, "text", found[start].place)) == found[start:]


def test_a_file_that_can_be_entered_is_not_read_from_its_beginning(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path)
    found = list(records(path, Form.LINES, "text"))
    content = path.read_bytes()
    path.write_bytes(b"\xff" * found[100].place.offset + content[found[100].place.offset :])
    assert can_be_entered(path, Form.LINES)
    assert list(records(path, Form.LINES, "text", found[100].place)) == found[100:]


def only(path: Path, alone: bool = False) -> Record:
    [record] = records(path, form_of(path, alone), "text")
    return record


def test_a_file_of_several_is_a_record_whatever_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "empty.txt").write_text("")
    assert only(tmp_path / "a.txt").text == "one\n\ntwo"
    assert only(tmp_path / "empty.txt").text == ""
    assert list(records(tmp_path / "empty.txt", Form.PIECES, "text")) == []


def faults(path: Path, alone: bool = True) -> list[tuple[int, str]]:
    return [(record.line, record.fault) for record in records(path, form_of(path, alone), "text") if record.fault]


BAD_LINES = [
    pytest.param(b'{"text": "caf\xe9"}', "not UTF-8: byte 0xe9", id="not utf-8"),
    pytest.param(b'{"text": "cut o', "not JSON: column 16: Invalid control character", id="broken"),
    pytest.param(b'{"body": 1}', "no key 'text'; it has 'body'", id="no key"),
    pytest.param(b'["text"]', "a JSON list; each line must be an object", id="no object"),
    pytest.param(b'{"text": 3}', "'text' is of type int; it must be text", id="no text"),
    pytest.param(b"[" * 200_000, "not JSON", id="nested"),
    pytest.param(b'{"text": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit", id="long number"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
@pytest.mark.parametrize("gzipped", [False, True], ids=["plain", "gz"])
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path: Path, line: bytes, reason: str, gzipped: bool) -> None:
    content = b'{"text": "first"}\n\n' + line + b'\n{"text": "last"}\n'
    path = tmp_path / ("a.jsonl.gz" if gzipped else "a.jsonl")
    path.write_bytes(gzip.compress(content) if gzipped else content)
    found = list(records(path, Form.LINES, "text"))
    assert [record.text for record in found] == ["first", None, "last"]
    assert found[1].line == 3 and found[1].fault.startswith(reason)
    assert found[2].place.row == 2  # a bad row has a number too: mending it moves no other


def test_bytes_that_are_no_text_cost_their_own_piece_only(tmp_path: Path) -> None:
    path = write_txt(tmp_path)
    good = list(records(path, Form.PIECES, "text"))
    content = bytearray(path.read_bytes())
    at = good[2].place.offset + 100
    content[at] = 0xFF
    path.write_bytes(content)
    found = list(records(path, Form.PIECES, "text"))
    assert found[:2] + found[3:] == good[:2] + good[3:]
    assert found[2].text is None and found[2].fault == "not UTF-8: byte 0xff"
    assert found[2].line == 1 + content[:at].count(b"\n")


def test_a_whole_file_that_is_no_text_is_named_with_the_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\ncaf\xe9\n")
    assert faults(tmp_path / "a.txt", alone=False) == [(3, "not UTF-8: byte 0xe9")]


@pytest.mark.parametrize("write", [write_jsonl_gz, write_txt_gz], ids=["jsonl", "txt"])
def test_of_a_gzip_stream_that_is_cut_off_the_rest_is_one_bad_record(
    tmp_path: Path, write: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.data.corpus.pieces.READ_BYTES", 1000)
    path = write(tmp_path)
    form = form_of(path, alone=True)
    whole = list(records(path, form, "text"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found = list(records(path, form, "text"))
    assert 1 < len(found) < len(whole)
    assert found[:-1] == whole[: len(found) - 1]
    assert found[-1].text is None and "cut off" in found[-1].fault
    assert found[-1].line == whole[len(found) - 1].place.line or form is Form.LINES  # blank lines may lie between


def test_what_is_no_gzip_stream_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(b"plain")
    assert "Not a gzipped file" in faults(tmp_path / "a.txt.gz")[0][1]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_what_is_no_table_is_one_bad_record(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"nothing like it" * 10)
    [(line, reason)] = faults(tmp_path / name)
    assert line == 1 and f"no {name[2:]} file" in reason


def test_a_table_that_is_damaged_is_read_up_to_there(tmp_path: Path) -> None:
    path = write_parquet(tmp_path)
    whole = list(records(path, Form.COLUMN, "text"))
    content = bytearray(path.read_bytes())
    start = parquet.ParquetFile(path).metadata.row_group(5).column(0).dictionary_page_offset
    content[start : start + 20] = b"\xff" * 20
    path.write_bytes(content)
    found = list(records(path, Form.COLUMN, "text"))
    assert found[:-1] == whole[: len(found) - 1]
    assert found[-1].text is None and "damaged from here on" in found[-1].fault


def test_a_table_without_the_column_is_one_bad_record(tmp_path: Path) -> None:
    path = write_parquet(tmp_path)
    [record] = records(path, Form.COLUMN, "body")
    assert "has no 'body'; it has 'text'" in record.fault


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert faults(tmp_path / "gone.jsonl") == [(1, "can't be read: No such file or directory")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "b.txt"])
def test_one_line_of_100_mb_is_named_and_what_follows_is_read(tmp_path: Path, name: str) -> None:
    alone = name != "b.txt"
    with gzip.open(tmp_path / name, "wb", 1) if name.endswith("gz") else (tmp_path / name).open("wb") as file:
        file.write(b'{"text": "first"}\n' + b"\n" * (name == "a.txt"))
        for _ in range(100):
            file.write(b"x" * 1_000_000)
        file.write(b"\n\n" + b'{"text": "last"}\n')
    found = list(records(tmp_path / name, form_of(tmp_path / name, alone), "text"))
    bad = [record for record in found if record.fault]
    assert len(bad) == 1 and "longer than 16,777,216 bytes" in bad[0].fault
    if name.startswith("a.jsonl"):
        assert bad[0].line == 2
        assert [record.text for record in found] == ["first", None, "last"]
    if name == "a.txt":
        assert [record.text for record in found] == [None, '{"text": "last"}\n']
        assert found[1].place.offset == 19 + 100_000_000 + 2
