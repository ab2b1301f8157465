"""Final status of a run, an object for each of its ends: a run that was resumed may end again.

RUN/status-0000000002.json      written by the controller of term 2
"""

import json
import re
from contextlib import suppress

from orchestrator.errors import JournalCorrupt, NotFound
from orchestrator.protocol.codec import from_plain
from orchestrator.protocol.status import RunStatus
from orchestrator.storage.backends.location import Location, objects_at
from orchestrator.storage.journal import newest_term
from orchestrator.storage.objects import Objects


def status_key(term: int) -> str:
    """Key of the status with which this term ended the run: numbers sort as text does."""
    return f"status-{term:010d}.json"


def read_status(location: Location) -> RunStatus:
    """The run's final status. Raises NotFound if it has not ended."""
    objects = objects_at(location)
    key = _newest(objects)
    if key is None:
        raise NotFound(f"{location} holds no status-*.json of its newest term: no run has ended there")
    return from_plain(RunStatus, json.loads(objects.get(key)))


def has_ended(location: Location) -> bool:
    """Whether a run has ended there, and was not resumed since. Raises OSError."""
    return _newest(objects_at(location)) is not None


def _newest(objects: Objects) -> str | None:
    """Key of the final status, unless a controller has taken a term since: it has resumed the run, and a past
    controller may have written its status afterwards."""
    found = [name for name in objects.names("") if re.fullmatch(r"status-\d{10}\.json", name)]
    if not found:
        return None
    with suppress(JournalCorrupt):  # then nobody has resumed it
        if found[-1] < status_key(newest_term(objects)):
            return None
    return found[-1]
