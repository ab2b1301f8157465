from pathlib import Path

import pytest

from orchestrator.data.corpus.sources import Document, read_documents
from orchestrator.errors import DataError


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def test_a_directory_is_read_recursively_in_the_order_of_paths(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", "a.txt", "not-text.md"):
        write(tmp_path / name, f"text of {name}\r\n")
    write(tmp_path / "blank.txt", " \n\n")
    assert list(read_documents(str(tmp_path))) == [
        Document(name, f"text of {name}\r\n") for name in ("a.txt", "a/b/c.txt", "a/z.txt", "b.txt")
    ]


def test_a_lone_file_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    text = "".join(f"Paragraph {number} of a long book.\n" * 20 + "\n" for number in range(100))
    documents = list(read_documents(str(write(tmp_path / "book.txt", text))))
    assert len(documents) > 2
    assert [document.id for document in documents] == [f"book.txt#{number}" for number in range(len(documents))]
    assert "".join(document.text for document in documents) == text
    assert all(document.text.startswith("Paragraph") for document in documents)


def test_the_builtin_corpus_is_the_library_without_its_tests() -> None:
    texts = dict(read_documents("builtin:stdlib"))
    assert "json/decoder.py" in texts
    assert not any(part in {"test", "tests", "site-packages"} for name in texts for part in name.split("/"))
    assert sum(map(len, texts.values())) > 5_000_000


def test_a_file_that_is_not_utf8_is_named_with_the_line(tmp_path: Path) -> None:
    write(tmp_path / "good.txt", "good")
    bad = write(tmp_path / "sub/bad.txt", b"caf\xc3\xa9 and\ncaf\xe9 again")
    with pytest.raises(DataError) as raised:
        list(read_documents(str(tmp_path)))
    assert f"{bad}:2: not UTF-8: byte 0xe9" in str(raised.value)
    assert raised.value.remedy
    assert raised.value.unchanged == "Nothing was written."


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write(tmp_path / "first.txt", "first")
    gone = write(tmp_path / "gone.txt", "gone")
    documents = read_documents(str(tmp_path))
    assert next(documents).text == "first"
    gone.unlink()
    with pytest.raises(DataError, match=r"gone\.txt:1: can't be read: No such file"):
        next(documents)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("missing", "doesn't exist", id="missing"),
        pytest.param("page.html", "is none of .txt", id="not text"),
        pytest.param("empty", "is empty: 0 files", id="no file"),
        pytest.param("blank", "is empty: 2 files", id="only white space"),
    ],
)
def test_a_source_without_text_is_refused(tmp_path: Path, name: str, message: str) -> None:
    write(tmp_path / "page.html", "<p>")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "blank/a.txt", "")
    write(tmp_path / "blank/b.txt", "\n")
    with pytest.raises(DataError, match=message) as raised:
        list(read_documents(str(tmp_path / name)))
    assert name in str(raised.value)
    assert raised.value.remedy
    assert raised.value.unchanged == "Nothing was written."


def test_unknown_builtin_is_refused() -> None:
    with pytest.raises(DataError, match="builtin:wikipedia doesn't exist"):
        list(read_documents("builtin:wikipedia"))
