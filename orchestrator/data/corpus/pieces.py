"""Pieces of a plain file that is the whole corpus, cut at blank lines.

Invalid UTF-8 becomes lone surrogates. A piece that is too long is counted, but not held.
"""

import codecs
from collections.abc import Iterator
from io import BufferedIOBase
from typing import NamedTuple

CUT_CHARS = 16_384  # minimum length of a piece, except for the last one
LARGEST_BYTES = 1 << 24  # of one record
READ_BYTES = 1 << 20


class Piece(NamedTuple):
    """Text up to a blank line or the end of the file, the blank line included."""

    text: str | None  # None: too long to be held
    num_bytes: int
    num_lines: int

    @classmethod
    def of(cls, text: str) -> "Piece":
        return cls(text, len(text.encode("utf-8", "surrogateescape")), text.count("\n"))


def pieces_of(file: BufferedIOBase) -> Iterator[Piece]:
    """The pieces of a file from its present position on, which is the beginning of one."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    held, ended, lost = "", False, Piece(None, 0, 0)  # lost: the discarded beginning of a piece that is too long
    while True:
        blank = held.find("\n\n", 0 if lost.num_bytes else CUT_CHARS)
        if blank < 0 and not ended:
            if len(held) > LARGEST_BYTES:  # all but the last character, which may begin a blank line
                lost, held = _joined(lost, Piece.of(held[:-1])), held[-1:]
            some = file.read(READ_BYTES)
            ended = not some
            held += decoder.decode(some, ended)
            continue
        end = len(held) if blank < 0 else blank + 2
        if not end and not lost.num_bytes:
            return
        piece, held = Piece.of(held[:end]), held[end:]
        yield _joined(lost, piece) if lost.num_bytes else piece
        lost = Piece(None, 0, 0)


def _joined(lost: Piece, more: Piece) -> Piece:
    return Piece(None, lost.num_bytes + more.num_bytes, lost.num_lines + more.num_lines)
