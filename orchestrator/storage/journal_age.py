"""Age of a journal by storage's own clock, whatever the clocks of those who write and read it."""

import re
import secrets
import time
from contextlib import suppress

from orchestrator.storage.chain import FOLDER
from orchestrator.storage.objects import LargeObjects


def journal_age_s(objects: LargeObjects) -> float:
    """Seconds since the newest entry was written; infinite without any. An object that is written now shows the time.

    On storage that refuses to write, this machine's clock has to do. Raises OSError if the journal can't be read.
    """
    now = f"{FOLDER}/now-{secrets.token_hex(8)}"
    with suppress(OSError):
        objects.create(now, b"")
    written_s = {found.key: found.written_s for found in objects.objects(FOLDER)}
    with suppress(OSError):
        objects.delete([now])
    newest_s = max((at_s for key, at_s in written_s.items() if _is_entry(key)), default=float("-inf"))
    return written_s.get(now, time.time()) - newest_s


def _is_entry(key: str) -> bool:
    return re.fullmatch(r"\d{10}", key.rpartition("/")[2]) is not None
