from pathlib import Path

import pytest

from orchestrator.data.corpus.sources import Document, open_corpus
from orchestrator.errors import DataError


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def test_a_directory_is_read_recursively_in_the_order_of_paths(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", "a.txt", "not-text.md"):
        write(tmp_path / name, f"text of {name}\r\n")
    write(tmp_path / "blank.txt", " \n\n")
    corpus = open_corpus(str(tmp_path))
    assert corpus.ids == ("a.txt", "a/b/c.txt", "a/z.txt", "b.txt")
    assert list(corpus) == [Document(name, f"text of {name}\r\n") for name in corpus.ids]
    assert corpus.num_bytes == sum(len(document.text) for document in corpus)


def test_the_digest_depends_on_names_and_texts_and_on_nothing_else(tmp_path: Path) -> None:
    def digest(case: str, files: dict[str, str]) -> str:
        for name, text in files.items():
            write(tmp_path / case / name, text)
        return open_corpus(str(tmp_path / case)).digest

    first = digest("first", {"a.txt": "one", "b.txt": "two"})
    assert digest("same elsewhere", {"b.txt": "two", "a.txt": "one"}) == first
    assert digest("other text", {"a.txt": "one", "b.txt": "too"}) != first
    assert digest("other name", {"a.txt": "one", "c.txt": "two"}) != first
    assert digest("other border", {"a.txt": "onet", "b.txt": "wo"}) != first


def test_a_lone_file_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    text = "".join(f"Paragraph {number} of a long book.\n" * 20 + "\n" for number in range(100))
    corpus = open_corpus(str(write(tmp_path / "book.txt", text)))
    documents = list(corpus)
    assert len(documents) > 2
    assert [document.id for document in documents] == [f"book.txt#{number}" for number in range(len(documents))]
    assert "".join(document.text for document in documents) == text
    assert all(document.text.startswith("Paragraph") for document in documents)


def test_the_builtin_corpus_is_the_library_without_its_tests() -> None:
    corpus = open_corpus("builtin:stdlib")
    assert "json/decoder.py" in corpus.ids
    assert not any(part in {"test", "tests", "site-packages"} for name in corpus.ids for part in name.split("/"))
    assert corpus.num_bytes > 5_000_000
    assert open_corpus("builtin:stdlib").digest == corpus.digest


def test_a_file_that_is_not_utf8_is_named_with_the_offset(tmp_path: Path) -> None:
    write(tmp_path / "good.txt", "good")
    bad = write(tmp_path / "sub/bad.txt", b"caf\xc3\xa9 and caf\xe9 again")
    with pytest.raises(DataError) as raised:
        open_corpus(str(tmp_path))
    assert f"{bad} is not UTF-8: byte 0xe9 at offset 13" in str(raised.value)
    assert raised.value.remedy
    assert raised.value.unchanged == "Nothing was written."


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write(tmp_path / "good.txt", "good")
    long_ago = write(tmp_path / "gone.txt", "gone")
    corpus = open_corpus(str(tmp_path))
    long_ago.unlink()
    with pytest.raises(DataError, match=r"gone\.txt can't be read: No such file"):
        list(corpus)


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
        open_corpus(str(tmp_path / name))
    assert name in str(raised.value)
    assert raised.value.remedy
    assert raised.value.unchanged == "Nothing was written."


def test_unknown_builtin_is_refused() -> None:
    with pytest.raises(DataError, match="builtin:wikipedia doesn't exist"):
        open_corpus("builtin:wikipedia")


@pytest.mark.parametrize("change", ["text", "more documents", "fewer documents"])
def test_a_corpus_that_changes_under_way_is_noticed(tmp_path: Path, change: str) -> None:
    text = ("word " * 4000 + "\n\n") * 3
    path = write(tmp_path / "book.txt", text)
    corpus = open_corpus(str(path))
    write(path, {"text": "W" + text[1:], "more documents": text + "more", "fewer documents": text[:20_002]}[change])
    read: list[Document] = []
    with pytest.raises(DataError, match="changed while it was read"):
        read.extend(corpus)
    assert len(read) <= len(corpus.ids)
