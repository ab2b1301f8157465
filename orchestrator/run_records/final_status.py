"""Final status of a run, an object for each of its ends: a run that was resumed may end again.

RUN/status-0000000002.json      written by the controller of term 2
"""

import json
import re

from orchestrator.errors import NotFound
from orchestrator.protocol.codec import from_plain
from orchestrator.protocol.status import RunStatus
from orchestrator.storage.backends.location import Location, objects_at
from orchestrator.storage.objects import Objects


def status_key(term: int) -> str:
    """Key of the status with which this term ended the run: numbers sort as text does."""
    return f"status-{term:010d}.json"


def read_status(location: Location) -> RunStatus:
    """The run's final status. Raises NotFound if it has not ended."""
    objects = objects_at(location)
    keys = _keys(objects)
    if not keys:
        raise NotFound(f"{location} holds no status-*.json: no run has ended there")
    return from_plain(RunStatus, json.loads(objects.get(keys[-1])))


def has_ended(location: Location) -> bool:
    """Whether a run has ended there, and was not resumed since. Raises OSError."""
    return bool(_keys(objects_at(location)))


def drop_statuses(objects: Objects) -> None:
    """Delete the statuses of a run's previous ends: it has been resumed. Raises OSError."""
    objects.delete(_keys(objects))


def _keys(objects: Objects) -> list[str]:
    return [name for name in objects.names("") if re.fullmatch(r"status-\d{10}\.json", name)]
