"""First reading of a corpus: find the documents among its records, their locations, and a digest over them.

One process reads everything once, in order, because the digest that names a store covers all documents in order, and
because the first of equal texts is kept. No text stays in memory: a document takes a byte or two, or up to 48 with
deduplication. The slow part, tokenising, follows in blocks on any node.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from orchestrator.data.corpus.files import KINDS
from orchestrator.data.corpus.records import Record, form_of, records
from orchestrator.data.corpus.sources import document_id, find_files
from orchestrator.data.holdout import Holdout, fraction_of
from orchestrator.data.manifest import Dropped, PrepareOptions, TextSource
from orchestrator.data.prepare.blocks import BlockBuilder, Kept, RecordBlock, SourceFile
from orchestrator.data.prepare.digest_set import KEY_BYTES, DigestSet
from orchestrator.data.prepare.quarantine import Quarantine
from orchestrator.errors import DataError

BLOCKS = 128  # target number per corpus, within the limits below
SMALLEST_BLOCK, LARGEST_BLOCK = 1 << 20, 1 << 24  # characters
TELL_EVERY = 256  # records


@dataclass(frozen=True)
class Scan:
    """Result of the first reading.

    Attributes:
        sources: each with its counts, in the requested order.
        first_documents: number of each source's first document, then the number of all documents.
        held_out: 1 for each document in `validation`, else 0.
        ranks: hash of each document's id in [0, 1), which orders surplus documents of a source; empty without weights.
        num_records, num_empty: records read, and those of them without text.
    """

    blocks: tuple[RecordBlock, ...]
    sources: tuple[TextSource, ...]
    first_documents: tuple[int, ...]
    held_out: bytearray
    ranks: "array[float]"
    num_records: int
    num_empty: int

    @property
    def num_documents(self) -> int:
        return self.first_documents[-1]

    @property
    def num_bytes(self) -> int:
        return sum(source.num_bytes for source in self.sources)

    @property
    def digest(self) -> str:
        """The digest of the only source, or a digest over those of several."""
        digests = [source.digest for source in self.sources]
        return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode("ascii")).hexdigest()


def scan(
    sources: Sequence[str],
    text_key: str,
    options: PrepareOptions,
    quarantine: Quarantine,
    ids: IO[str],
    report: Callable[[float], None],
    max_bad: float = 0.0,
) -> Scan:
    """Read the sources in order.

    Args:
        sources: see `read_documents`. With several, ids begin with the source's number, from 0, and a colon.
        quarantine: gets the bad records.
        ids: gets the ids of the documents, a JSON string per line.
        report: called with the fraction that has been read.
        max_bad: largest allowed share of bad records.

    Raises:
        DataError: no such source, too many bad records, a source without documents, or fewer than two documents in all.
    """
    listed = [_Listed.of(number, source, len(sources) > 1) for number, source in enumerate(sources)]
    scanner = _Scanner(text_key, options, quarantine, ids, report, listed)
    for source in listed:
        scanner.read(source)
    quarantine.check(scanner.num_records, max_bad)
    return scanner.finished()


@dataclass(frozen=True)
class _Listed:
    """A source and its files."""

    name: str
    prefix: str  # of document ids in the store
    root: Path
    files: tuple[Path, ...]
    num_bytes: int

    @classmethod
    def of(cls, number: int, source: str, several: bool) -> "_Listed":
        root, files = find_files(source)
        return cls(source, f"{number}:" if several else "", root, files, sum(map(_size, files)))


@dataclass
class _Counts:
    num_documents: int = 0
    num_bytes: int = 0
    shorter: int = 0
    longer: int = 0
    duplicates: int = 0
    bad: int = 0

    def dropped(self) -> Dropped | None:
        found = Dropped(shorter=self.shorter, longer=self.longer, duplicates=self.duplicates, bad=self.bad)
        return found if found.total else None


class _Scanner:
    def __init__(
        self,
        text_key: str,
        options: PrepareOptions,
        quarantine: Quarantine,
        ids: IO[str],
        report: Callable[[float], None],
        listed: Sequence[_Listed],
    ) -> None:
        self._text_key, self._options, self._quarantine = text_key, options, quarantine
        self._ids, self._tell, self._listed = ids, report, listed
        self._seen = DigestSet() if options.deduplicate else None
        self._splits = Holdout(options.holdout)
        self._ranks = array("d")
        self._all_bytes = max(1, sum(source.num_bytes for source in listed))
        self._done_bytes = self.num_records = self._num_empty = 0
        wanted = min(LARGEST_BLOCK, max(SMALLEST_BLOCK, self._all_bytes // BLOCKS))
        self._blocks = BlockBuilder(text_key, wanted)
        self._sources: list[TextSource] = []

    def read(self, source: _Listed) -> None:
        counts, digest = _Counts(), hashlib.sha256()
        for path in source.files:
            name = path.relative_to(source.root).as_posix()
            file = SourceFile(path.absolute(), source.prefix + name, form_of(path, len(source.files) == 1))
            for record in records(file.path, file.form, self._text_key):
                kept = self._judge(source.name, file, record, counts)
                if kept is not None:
                    bare = document_id(name, file.form, record.place.row)
                    counts.num_bytes += _add_to_digest(digest, bare, kept.raw)
                    counts.num_documents += 1
                    self._enter(kept)
                self._blocks.add(file, record, kept)
                file.num_chars += len(record.text or "")
                self._progress(file)
            if not file.has_text:
                self._quarantine.note_empty(source.name, file.path)
            self._done_bytes += _size(path)
        self._blocks.close()
        self._sources.append(
            TextSource(
                name=source.name,
                digest=digest.hexdigest(),
                num_documents=counts.num_documents,
                num_bytes=counts.num_bytes,
                dropped=counts.dropped(),
            )
        )

    def finished(self) -> Scan:
        firsts = [0]
        for source, listed in zip(self._sources, self._listed, strict=True):
            if not source.num_documents:
                raise _empty(source, len(listed.files))
            firsts.append(firsts[-1] + source.num_documents)
        return Scan(
            tuple(self._blocks.blocks),
            tuple(self._sources),
            tuple(firsts),
            self._splits.finished(),
            self._ranks,
            self.num_records,
            self._num_empty,
        )

    def _judge(self, source: str, file: SourceFile, record: Record, counts: _Counts) -> Kept | None:
        """The record's text if it is a document; else count the reason and return None."""
        self.num_records += 1
        text = record.text
        if text is None:
            counts.bad += 1
            file.has_text = True  # the quarantine lists it already
            self._quarantine.add(source, file.path, record.line, record.fault)
            return None
        if not text.strip():
            self._num_empty += 1
            return None
        file.has_text = True
        if len(text) < (self._options.min_chars or 0):
            counts.shorter += 1
            return None
        if self._options.max_chars is not None and len(text) > self._options.max_chars:
            counts.longer += 1
            return None
        raw = text.encode("utf-8")
        sha256 = hashlib.sha256(raw).digest()
        if self._seen is not None and not self._seen.add(sha256[:KEY_BYTES]):
            counts.duplicates += 1
            return None
        return Kept(document_id(file.name, file.form, record.place.row), raw, sha256)

    def _enter(self, kept: Kept) -> None:
        self._ids.write(json.dumps(kept.id) + "\n")
        self._splits.add(kept.id)
        if self._options.weights is not None:
            self._ranks.append(fraction_of(kept.id, b"weight"))

    def _progress(self, file: SourceFile) -> None:
        if self.num_records % TELL_EVERY == 0:
            self._tell(min(1.0, (self._done_bytes + file.num_chars) / self._all_bytes))


def _add_to_digest(digest: "hashlib._Hash", document_id: str, text: bytes) -> int:
    """Add a document to a digest, lengths first so that no two corpora collide; returns the bytes of its text."""
    name = os.fsencode(document_id)
    digest.update(f"{len(name)} {len(text)}\n".encode("ascii"))
    digest.update(name)
    digest.update(text)
    return len(text)


def _size(path: Path) -> int:
    """Size in bytes, for progress only: an unreadable file is reported when it is read."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _empty(source: TextSource, num_files: int) -> DataError:
    dropped = {} if source.dropped is None else source.dropped.model_dump()
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
    return DataError(
        f"the corpus {source.name} is empty: {num_files} files, "
        + (f"all left out: {reasons}" if reasons else "none with text"),
        remedy=f"Name files that hold text ({KINDS}), or builtin:stdlib; or have min_chars and max_chars admit more.",
        unchanged="No store was written.",
    )
