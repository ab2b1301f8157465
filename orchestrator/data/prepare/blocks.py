"""Blocks: consecutive records of a corpus, the unit of work on any node.

A block has the location of its records and marks which of them are documents, with a digest over these; it holds no
text. Its task reads the files, so they must be readable on every node, and detects if they have changed.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from orchestrator.data.corpus.records import BEGINNING, Form, Place, Record, can_be_entered, records
from orchestrator.data.corpus.sources import Document, document_id
from orchestrator.errors import DataError

LARGEST_RECORDS = 1 << 16  # in a block
# A block in the middle of a file that can't be entered there requires reading all before it. Blocks that grow with
# their distance from the start keep the total below 9 times the file.
GROWTH = 8


@dataclass(frozen=True)
class Stretch:
    """Consecutive records of a file. `name` is the file's name in document ids; `row`, `line` and `offset` locate the
    first record."""

    path: str
    name: str
    form: Form
    row: int
    line: int
    offset: int
    num_records: int


@dataclass(frozen=True)
class RecordBlock:
    """Consecutive records of a source.

    Attributes:
        number: index of the block, from 0, in the order of the corpus.
        first_document: number of its first document in the corpus.
        kept: bit mask of the records that are documents, in hexadecimal.
        digest: sha256 over the ids and sha256s of its documents.
    """

    number: int
    text_key: str
    stretches: tuple[Stretch, ...]
    first_document: int
    num_documents: int
    kept: str
    digest: str


class Located(NamedTuple):
    """A document, with its file and line."""

    document: Document
    where: str


class BlockDigest:
    """Digest over a block's documents, each by its id and the sha256 of its text."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def add(self, document_id: str, text_sha256: bytes) -> None:
        name = document_id.encode("utf-8", "surrogateescape")
        self._sha256.update(len(name).to_bytes(8, "big") + name + text_sha256)

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()


@dataclass
class SourceFile:
    """A file during its first reading. `name` begins the ids of its documents."""

    path: Path
    name: str
    form: Form
    num_chars: int = 0  # so far
    has_text: bool = False


@dataclass(frozen=True)
class Kept:
    """A record that is a document, with its text in UTF-8."""

    id: str
    raw: bytes
    sha256: bytes


class BlockBuilder:
    """Groups consecutive records into blocks of about `wanted_chars` characters: `add` each, `close` at the end of each
    source."""

    def __init__(self, text_key: str, wanted_chars: int) -> None:
        self.blocks: list[RecordBlock] = []
        self._text_key, self._wanted_chars = text_key, wanted_chars
        self._num_documents = 0  # before the block
        self._file: SourceFile | None = None  # of the stretch that is open
        self._place = BEGINNING
        self._begin()

    def add(self, file: SourceFile, record: Record, kept: Kept | None) -> None:
        wanted = self._wanted_chars
        if not can_be_entered(file.path, file.form):
            wanted = max(wanted, file.num_chars // GROWTH)
        if self._num_chars >= wanted or len(self._kept) >= LARGEST_RECORDS:
            self.close()
        if file is not self._file:
            self._close_stretch()
            self._file, self._place = file, record.place
        self._kept.append(kept is not None)
        self._num_chars += len(record.text or "")
        if kept is not None:
            self._digest.add(kept.id, kept.sha256)

    def close(self) -> None:
        """End the block. A block without documents is left out."""
        self._close_stretch()
        num_documents = sum(self._kept)
        if num_documents:
            self.blocks.append(
                RecordBlock(
                    len(self.blocks),
                    self._text_key,
                    tuple(self._stretches),
                    self._num_documents,
                    num_documents,
                    np.packbits(np.frombuffer(bytes(self._kept), np.uint8)).tobytes().hex(),
                    self._digest.hexdigest(),
                )
            )
            self._num_documents += num_documents
        self._begin()

    def _begin(self) -> None:
        self._stretches: list[Stretch] = []
        self._kept = bytearray()  # a byte per record
        self._digest = BlockDigest()
        self._num_chars = self._num_before = 0  # before: records of the block in closed stretches

    def _close_stretch(self) -> None:
        if self._file is not None:
            num_records = len(self._kept) - self._num_before
            self._stretches.append(
                Stretch(str(self._file.path), self._file.name, self._file.form, *self._place, num_records)
            )
        self._num_before, self._file = len(self._kept), None


def documents_of(block: RecordBlock) -> Iterator[Located]:
    """Read the documents of a block. Raises DataError, at the end or earlier, if the files have changed."""
    num_records = sum(stretch.num_records for stretch in block.stretches)
    kept = np.unpackbits(np.frombuffer(bytes.fromhex(block.kept), np.uint8), count=num_records)
    digest, number = BlockDigest(), 0
    for stretch in block.stretches:
        place = Place(stretch.row, stretch.line, stretch.offset)
        found = records(Path(stretch.path), stretch.form, block.text_key, place)
        for record in islice(found, stretch.num_records):
            if kept[number]:
                if record.text is None:
                    raise _changed(stretch.path)
                document = Document(document_id(stretch.name, stretch.form, record.place.row), record.text)
                digest.add(document.id, hashlib.sha256(record.text.encode("utf-8", "replace")).digest())
                yield Located(document, f"{stretch.path}:{record.line}")
            number += 1
    if number != num_records or digest.hexdigest() != block.digest:
        raise _changed(", ".join(dict.fromkeys((block.stretches[0].path, block.stretches[-1].path))))


def _changed(path: str) -> DataError:
    return DataError(
        f"the corpus changed while it was read: {path} was modified",
        remedy="Leave its files alone and start again.",
        unchanged="No store was written.",
    )
