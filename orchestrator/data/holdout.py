"""Choice of validation documents, by their ids, so that it is stable as a corpus grows."""

import hashlib
import os

from orchestrator.errors import DataError


class Holdout:
    """Marks documents, in order, as held out or not, in one byte of memory each.

    Documents are ranked by a hash of their id in [0, 1); those below `holdout` are held out. If that leaves a split
    empty, the lowest (or the highest) goes there.
    """

    def __init__(self, holdout: float) -> None:
        self._holdout = holdout
        self._held_out = bytearray()
        self._lowest = (1.0, -1)  # rank, number of the document
        self._highest = (-1.0, -1)

    def add(self, document_id: str) -> None:
        rank, number = fraction_of(document_id), len(self._held_out)
        self._held_out.append(rank < self._holdout)
        if rank < self._lowest[0]:
            self._lowest = (rank, number)
        if rank > self._highest[0]:
            self._highest = (rank, number)

    def finished(self) -> bytearray:
        """1 for each document that is held out, else 0. Raises DataError for fewer than two documents."""
        if len(self._held_out) < 2:
            raise DataError(
                f"the corpus has {len(self._held_out)} document; it needs at least 2, one to train and one to validate "
                "on",
                remedy="Add a file, or separate the parts of the only one by blank lines.",
                unchanged="Nothing was written.",
            )
        self._held_out[self._lowest[1]] = True
        self._held_out[self._highest[1]] = False
        return self._held_out


def fraction_of(document_id: str, purpose: bytes = b"holdout") -> float:
    """A hash in [0, 1) of the id and the purpose."""
    digest = hashlib.sha256(purpose + b"\n" + os.fsencode(document_id)).digest()
    return int.from_bytes(digest[:6], "big") / (1 << 48)
