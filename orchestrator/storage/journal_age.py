"""Age of a journal by storage's own clock, whatever the clocks of those who write and read it."""

import secrets
import time
from contextlib import suppress

from orchestrator.storage.chain import FOLDER
from orchestrator.storage.objects import LargeObjects

LIVELY_S = 120.0  # age of the journal of a run that may be going on, at most
_NOW = f"{FOLDER}/now-"


def journal_age_s(objects: LargeObjects) -> float:
    """Seconds since an entry was written, or compacted; infinite without any.

    An object that is written now shows the time. On storage that refuses to write, this machine's clock has to do.
    Raises OSError if the journal can't be read.
    """
    now = _NOW + secrets.token_hex(8)
    with suppress(OSError):
        objects.create(now, b"")
    written_s = {found.key: found.written_s for found in objects.objects(FOLDER)}
    with suppress(OSError):
        objects.delete([now])
    now_s = written_s.get(now, time.time())
    others = (at_s for key, at_s in written_s.items() if not key.startswith(_NOW))
    return now_s - max(others, default=float("-inf"))
