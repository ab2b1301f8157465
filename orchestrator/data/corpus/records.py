"""Streams of records from files, starting at any record; faults are records too.

A fault is a record so that preparation can quarantine it and go on. Only one record and the read-ahead buffer are in
memory.

If the rest of a file can't be read (a truncated gzip stream, a damaged Parquet page), it counts as one bad record, the
file's last.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from io import BufferedIOBase
from pathlib import Path
from typing import NamedTuple

from orchestrator.data.corpus.files import column, is_plain
from orchestrator.data.corpus.pieces import LARGEST_BYTES, READ_BYTES, pieces_of
from orchestrator.errors import DataError


class Form(StrEnum):
    """How a file is split into records."""

    WHOLE = "whole"  # one record
    PIECES = "pieces"  # at blank lines: a plain file that is the whole corpus
    LINES = "lines"  # JSON lines
    COLUMN = "column"  # one record per row


class Place(NamedTuple):
    """Start of a record."""

    row: int = 0  # records before it
    line: int = 1  # of the file; in a column its row, from 1
    offset: int = 0  # in bytes; in compressed files, of the uncompressed content


BEGINNING = Place()


class Record(NamedTuple):
    """A text that UTF-8 can encode; or a fault, with `text` None and its own `line`."""

    place: Place
    line: int
    text: str | None
    fault: str = ""


class Unreadable(Exception):
    """The rest of a file can't be read."""


@dataclass
class _Cursor:
    """Position in a file, to name what can't be read."""

    row: int = 0
    line: int = 1
    offset: int = 0

    @property
    def place(self) -> Place:
        return Place(self.row, self.line, self.offset)


def form_of(path: Path, alone: bool) -> Form:
    """The form of a file; `alone`: it is the only file of its corpus."""
    if path.suffix == ".py" or (is_plain(path) and not alone):
        return Form.WHOLE
    if is_plain(path):
        return Form.PIECES
    return Form.LINES if path.name.endswith((".jsonl", ".jsonl.gz")) else Form.COLUMN


def can_be_entered(path: Path, form: Form) -> bool:
    """Whether reading can begin at a record without reading the ones before it."""
    return form in (Form.LINES, Form.PIECES) and not path.name.endswith(".gz")


def records(path: Path, form: Form, text_key: str, start: Place = BEGINNING) -> Iterator[Record]:
    """The records of a file from `start` on, which is the place of one of them.

    Blank lines are not records; texts of white space are. Bad content never raises.
    """
    cursor = _Cursor(*start) if can_be_entered(path, form) else _Cursor()
    reading = _READERS[form](path, text_key, cursor, start.row)
    while True:
        try:
            record = next(reading)
        except StopIteration:
            return
        except (OSError, EOFError, zlib.error, Unreadable) as error:
            yield Record(cursor.place, cursor.line, None, _why(error))
            return
        yield record


def _why(error: Exception) -> str:
    if isinstance(error, EOFError | zlib.error):
        return f"the gzip stream is cut off or damaged: {error}; the rest of the file is lost"
    if isinstance(error, OSError):
        return f"can't be read: {error.strerror or error}"
    return str(error)


def _whole(path: Path, text_key: str, cursor: _Cursor, first_row: int) -> Iterator[Record]:
    with _opened(path) as file:
        content = file.read(LARGEST_BYTES + 1)
    if len(content) > LARGEST_BYTES:
        yield Record(Place(), 1, None, _too_long("the file"))
        return
    try:
        yield Record(Place(), 1, content.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        yield Record(Place(), line, None, _not_utf8(content[error.start]))


def _lines(path: Path, text_key: str, cursor: _Cursor, first_row: int) -> Iterator[Record]:
    with _opened(path) as file:
        if cursor.offset:
            file.seek(cursor.offset)
        while line := file.readline(LARGEST_BYTES + 1):
            place, num_bytes = cursor.place, len(line)
            too_long = num_bytes > LARGEST_BYTES
            if too_long:
                num_bytes += _rest_of_line(file, line)
            cursor.line += 1
            cursor.offset += num_bytes
            if not too_long and not line.strip():
                continue
            cursor.row += 1
            if place.row < first_row:
                continue
            if too_long:
                yield Record(place, place.line, None, _too_long("the line"))
            else:
                yield _row(line, text_key, place)


def _rest_of_line(file: BufferedIOBase, line: bytes) -> int:
    """Read to the end of the line; returns the number of bytes read."""
    num_bytes = 0
    while not line.endswith(b"\n") and (line := file.readline(READ_BYTES)):
        num_bytes += len(line)
    return num_bytes


def _row(line: bytes, text_key: str, place: Place) -> Record:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        return Record(place, place.line, None, _not_utf8(line[error.start]))
    except json.JSONDecodeError as error:
        return Record(place, place.line, None, f"not JSON: column {error.colno}: {error.msg}")
    except (ValueError, RecursionError) as error:
        return Record(place, place.line, None, f"not JSON: {error}")
    if not isinstance(row, dict):
        return Record(place, place.line, None, f"a JSON {type(row).__name__}; each line must be an object")
    if text_key not in row:
        return Record(place, place.line, None, f"no key {text_key!r}; it has {', '.join(map(repr, row)) or 'none'}")
    return _of_value(row[text_key], text_key, place)


def _of_value(value: object, text_key: str, place: Place) -> Record:
    """`null` is an empty text. JSON can encode half of a surrogate pair, and UTF-8 can't."""
    if value is None:
        return Record(place, place.line, "")
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            return Record(place, place.line, None, f"half of a surrogate pair at character {error.start}")
        return Record(place, place.line, value)
    return Record(place, place.line, None, f"{text_key!r} is of type {type(value).__name__}; it must be text")


def _column(path: Path, text_key: str, cursor: _Cursor, first_row: int) -> Iterator[Record]:
    import pyarrow

    cursor.row, cursor.line = first_row, first_row + 1
    try:
        for values in column(path, text_key, first_row):
            for value in values:
                place = cursor.place
                cursor.row, cursor.line = cursor.row + 1, cursor.line + 1
                try:
                    found = value.as_py()
                except UnicodeDecodeError as error:
                    yield Record(place, place.line, None, _not_utf8(error.object[error.start]))
                    continue
                yield _of_value(found, text_key, place)
    except DataError as error:  # no such column
        raise Unreadable(error.message) from error
    except (pyarrow.lib.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's; pyarrow's for damage have no errno
            raise
        what = " ".join(str(error).split())
        raise Unreadable(f"no {path.suffix.removeprefix('.')} file, or damaged from here on: {what}") from error


def _pieces(path: Path, text_key: str, cursor: _Cursor, first_row: int) -> Iterator[Record]:
    """Invalid UTF-8 becomes lone surrogates, which valid UTF-8 can't contain: a bad byte costs only its own piece."""
    with _opened(path) as file:
        if cursor.offset:
            file.seek(cursor.offset)
        for piece in pieces_of(file):
            place = cursor.place
            cursor.row, cursor.line, cursor.offset = (
                place.row + 1,
                place.line + piece.num_lines,
                place.offset + piece.num_bytes,
            )
            if place.row < first_row:
                continue
            if piece.text is None:
                yield Record(place, place.line, None, _too_long("the text between two blank lines"))
            else:
                yield _checked(piece.text, place)


def _checked(text: str, place: Place) -> Record:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        line = place.line + text.count("\n", 0, error.start)
        return Record(place, line, None, _not_utf8(ord(text[error.start]) - 0xDC00))
    return Record(place, place.line, text)


def _opened(path: Path) -> BufferedIOBase:
    return gzip.open(path) if path.name.endswith(".gz") else path.open("rb")


def _not_utf8(byte: int) -> str:
    return f"not UTF-8: byte 0x{byte:02x}"


def _too_long(what: str) -> str:
    return f"{what} is longer than {LARGEST_BYTES:,} bytes"


_READERS = {Form.WHOLE: _whole, Form.LINES: _lines, Form.COLUMN: _column, Form.PIECES: _pieces}
