"""Limits of time of requests to a bucket."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Patience:
    """Limits of time, in seconds.

    Args:
        answer_s: for the answer to a small request, and for the next bytes of an object that is read.
        upload_s: for a part of a large object, or a whole one of no more bytes.
        retry_s: after which no further attempt is made.
    """

    answer_s: float = 10.0
    upload_s: float = 60.0
    retry_s: float = 30.0


PATIENCE = Patience()
