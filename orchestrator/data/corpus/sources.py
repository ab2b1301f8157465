"""Text sources: a named source becomes documents in a fixed order.

Sources: `builtin:stdlib` (the running Python's own library, without its tests: English and code, on every
machine), `builtin:pydocs` (Python's manual, where Debian's python3.13-doc is installed), a directory of text files
(searched recursively), or one such file; `orchestrator.data.corpus.files` lists the formats. A plain file is a
document, and so is each row of the others; a corpus of one plain file is split at blank lines into documents, so that
whole documents can still be held out.
"""

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from orchestrator.data.corpus.files import KINDS, suffix_of, text_files
from orchestrator.data.corpus.records import Form, Record, form_of, records
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
            f"{root} is a prepared token store, not text",
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


def document_id(name: str, form: Form, row: int) -> str:
    """Id of a document; `name` is its file's path below the source's root, `row` the record's number in the file."""
    return name if form is Form.WHOLE else f"{name}#{row}"


def read_documents(source: str, text_key: str = "text") -> Iterator[Document]:
    """The documents of a source in a fixed order; those with only white space are left out.

    Args:
        source: `builtin:stdlib`, `builtin:pydocs`, a directory, or a file.
        text_key: key or column of the text in files that have rows.

    Raises:
        DataError: no such source, a bad record, or no text at all.
    """
    root, files = find_files(source)
    is_empty = True
    for path in files:
        name, form = path.relative_to(root).as_posix(), form_of(path, len(files) == 1)
        for record in records(path, form, text_key):
            if record.text is None:
                raise _bad(path, record)
            if record.text.strip():
                is_empty = False
                yield Document(document_id(name, form, record.place.row), record.text)
    if is_empty:
        raise DataError(
            f"the corpus {source} is empty: {len(files)} files, none with text",
            remedy=f"Point data.source at a directory with files that hold text ({KINDS}), or use builtin:stdlib.",
            unchanged="Nothing was written.",
        )


def _bad(path: Path, record: Record) -> DataError:
    return DataError(
        f"{path}:{record.line}: {record.fault}",
        remedy="Correct it, move it out of the corpus, or name the key that holds the text: data.text_key.",
        unchanged="Nothing was written.",
    )
