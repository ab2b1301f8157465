"""Objects that compaction leaves of a journal: a state and histories.

A state is two lines of JSON: what the journal's next entry and its fence need to know, and the fold of all entries up
to it, which is its caller's own. A history is a gzip file of entries as they were written, one per line, so that their
chain of digests can still be followed. Joined gzip files are a gzip file of all their lines.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from io import BytesIO

from orchestrator.storage.chain import HistoryName, Holder, Link, damaged, state_key

FORMAT = 1


@dataclass(frozen=True)
class JournalState:
    """What a journal comes to with the entry of `link`.

    Args:
        kept: numbers of the entries that stay, so that past controllers find no free name.
        fold: one line of JSON.
    """

    link: Link
    kept: tuple[int, ...]
    fold: bytes

    @property
    def key(self) -> str:
        return state_key(self.link.number)


def state_to_bytes(state: JournalState) -> bytes:
    digest = sha256(state.fold).hexdigest()
    head = {"format": FORMAT, **asdict(state.link), "kept": state.kept, "fold": digest}
    return json.dumps(head, separators=(",", ":")).encode() + b"\n" + state.fold


def state_from(number: int, data: bytes) -> JournalState:
    """Raises JournalCorrupt if it isn't the state of this entry, in this format, with all its bytes."""
    key, (line, _, fold) = state_key(number), data.partition(b"\n")
    try:
        head = json.loads(line)
        if head["format"] != FORMAT:
            raise damaged(key, f"is of format {head['format']!r}; this version reads format {FORMAT}")
        numbers = int(head["number"]), int(head["term"]), str(head["digest"]), int(head["next_seq"])
        link = Link(*numbers, Holder(**head["holder"]))
        kept, digest = tuple(int(kept) for kept in head["kept"]), head["fold"]
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(key, f"can't be read: {error!r}") from error
    if link.number != number:
        raise damaged(key, f"is that of entry {link.number}")
    if digest != sha256(fold).hexdigest():
        raise damaged(key, "is not whole: the SHA-256 of its second line differs")
    return JournalState(link, kept, fold)


def history_to_bytes(lines: Iterable[bytes]) -> bytes:
    return gzip.compress(b"".join(line + b"\n" for line in lines), mtime=0)


def lines_of(history: HistoryName, data: bytes) -> Iterator[bytes]:
    """Bytes of the history's entries, in order. Raises JournalCorrupt if it holds others than its name gives."""
    count = 0
    try:
        with gzip.GzipFile(fileobj=BytesIO(data)) as file:
            for line in file:
                yield line.rstrip(b"\n")
                count += 1
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise damaged(history.key, f"can't be read: {error!r}") from error
    if count != history.last - history.first + 1:
        raise damaged(history.key, f"holds {count} entries")
