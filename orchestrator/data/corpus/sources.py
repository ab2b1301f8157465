"""Text sources: a named source becomes documents in a fixed order, with a digest over all of them.

Sources: `builtin:stdlib` (the running Python's own library, without its tests: English and code, on every
machine), `builtin:pydocs` (Python's manual, where Debian's python3.13-doc is installed), a directory of text files
(searched recursively), or one such file; `orchestrator.data.corpus.files` lists the formats. A plain file is a
document, and so is each row of the others; a corpus of one plain file is split at blank lines into documents, so that
whole documents can still be held out.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from orchestrator.data.corpus.files import CUT_CHARS, KINDS, is_plain, suffix_of, text_files, texts_in
from orchestrator.data.manifest import is_store
from orchestrator.errors import DataError

BUILTIN_STDLIB = "builtin:stdlib"
BUILTIN_PYDOCS = "builtin:pydocs"
PYDOCS = Path("/usr/share/doc/python3.13/html/_sources")  # installed by Debian's package
_NOT_STDLIB = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


class Document(NamedTuple):
    """One text and its id: the path below the source's root, with `#n` for a row or for a part of a lone file."""

    id: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order; iterate to read them. Documents with only white space are left out.

    Iterating raises DataError at the end if the files changed since `open_corpus`, and never yields more than `ids`.
    """

    name: str
    digest: str  # sha256 over the ids and texts of all documents, in order
    ids: tuple[str, ...]
    num_bytes: int  # of text, in UTF-8
    root: Path
    files: tuple[Path, ...]
    text_key: str = "text"

    def __iter__(self) -> Iterator[Document]:
        digest = hashlib.sha256()
        for number, document in enumerate(_read_documents(self.root, self.files, self.text_key)):
            add_to_digest(digest, document)
            if number == len(self.ids):  # the files have grown: callers rely on `ids`
                break
            yield document
        if digest.hexdigest() != self.digest:
            raise DataError(
                f"the corpus {self.name} changed while it was read: its sha256 was {self.digest} and is now "
                f"{digest.hexdigest()}",
                remedy="Leave its files alone and start again.",
                unchanged="Nothing was written.",
            )


def open_corpus(source: str, text_key: str = "text") -> Corpus:
    """Read a source once, to check it and to compute its digest.

    Args:
        source: `builtin:stdlib`, `builtin:pydocs`, a directory, or a file.
        text_key: key or column of the text in files that have rows.

    Raises:
        DataError: no such source, an unreadable file, one that isn't UTF-8 or of the format its name implies, or no
            text at all.
    """
    root, files = find_files(source)
    digest, ids, num_bytes = hashlib.sha256(), [], 0
    for document in _read_documents(root, files, text_key):
        num_bytes += add_to_digest(digest, document)
        ids.append(document.id)
    if not ids:
        raise DataError(
            f"the corpus {source} is empty: {len(files)} files, none with text",
            remedy=f"Point data.source at a directory with files that hold text ({KINDS}), or use builtin:stdlib.",
            unchanged="Nothing was written.",
        )
    return Corpus(source, digest.hexdigest(), tuple(ids), num_bytes, root, files, text_key)


def find_files(source: str) -> tuple[Path, tuple[Path, ...]]:
    """The root of a source and its files in order. Raises DataError for an unknown source or an unreadable folder."""
    try:
        return _found(source)
    except OSError as error:
        raise DataError(
            f"data.source {source} can't be read: {error.filename}: {error.strerror}",
            remedy="Make it readable, or move it out of the corpus.",
            unchanged="Nothing was written.",
        ) from error


def _found(source: str) -> tuple[Path, tuple[Path, ...]]:
    if source == BUILTIN_PYDOCS:
        return PYDOCS, _pydocs()
    if source == BUILTIN_STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        found = [path for path in root.rglob("*.py") if not _NOT_STDLIB.intersection(path.relative_to(root).parts)]
        return root, tuple(sorted(found, key=lambda path: path.relative_to(root).as_posix()))
    root = Path(source)
    if is_store(root):
        raise DataError(
            f"{root} is a prepared token store, no text",
            remedy="Name the text that it was made of.",
            unchanged="Nothing was written.",
        )
    if root.is_dir():
        return root, text_files(root)
    if root.is_file() and suffix_of(root):
        return root.parent, (root,)
    what = f"is none of {KINDS}" if root.exists() else "doesn't exist"
    raise DataError(
        f"data.source {source} {what}; a source is builtin:stdlib, builtin:pydocs, a directory of such files, or "
        "one of them",
        remedy="Correct data.source; a relative path starts at the current directory.",
        unchanged="Nothing was written.",
    )


def _pydocs() -> tuple[Path, ...]:
    found = text_files(PYDOCS) if PYDOCS.is_dir() else ()
    if not found:
        raise DataError(
            f"data.source {BUILTIN_PYDOCS} is the reStructuredText of Debian's python3.13-doc, and {PYDOCS} has none",
            remedy="Install it (`apt-get install python3.13-doc`) on every machine that reads it, or name another "
            "source.",
            unchanged="Nothing was written.",
        )
    return found


def _read_documents(root: Path, files: tuple[Path, ...], text_key: str) -> Iterator[Document]:
    for path in files:
        name = path.relative_to(root).as_posix()
        if path.suffix == ".py" or (is_plain(path) and len(files) > 1):
            documents: Iterable[Document] = (Document(name, text) for text in texts_in(path, text_key))
        elif is_plain(path):
            documents = (document for text in texts_in(path, text_key) for document in _cut(name, text))
        else:
            documents = (Document(f"{name}#{row}", text) for row, text in enumerate(texts_in(path, text_key)))
        yield from (document for document in documents if document.text.strip())


def _cut(name: str, text: str) -> list[Document]:
    """Split a text at blank lines into documents of at least `CUT_CHARS`, keeping all characters."""
    documents: list[Document] = []
    start = 0
    while start < len(text):
        blank = text.find("\n\n", start + CUT_CHARS)
        end = len(text) if blank < 0 else blank + 2
        documents.append(Document(f"{name}#{len(documents)}", text[start:end]))
        start = end
    return documents


def add_to_digest(digest: "hashlib._Hash", document: Document) -> int:
    """Add a document to a digest, lengths first so that no two corpora collide; returns the bytes of its text.

    Raises DataError for half of a surrogate pair, which JSON can encode and UTF-8 can't.
    """
    try:
        text = document.text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"the document {document.id} holds half of a surrogate pair at character {error.start}; that is no text",
            remedy="Mend it, or move it out of the corpus.",
            unchanged="Nothing was written.",
        ) from error
    return add_bytes(digest, document.id, text)


def add_bytes(digest: "hashlib._Hash", document_id: str, text: bytes) -> int:
    """As `add_to_digest`, for a text in UTF-8."""
    name = os.fsencode(document_id)
    digest.update(f"{len(name)} {len(text)}\n".encode("ascii"))
    digest.update(name)
    digest.update(text)
    return len(text)
