"""Final status of a run, an object for each of its ends: a run that was resumed may end again.

RUN/status-0000000002.json      written by the controller of term 2
RUN/resumed-0000000003          written by that of term 3: no status of an earlier term counts
"""

import json
import re

from orchestrator.errors import NotFound, StorageError
from orchestrator.protocol.codec import from_plain
from orchestrator.protocol.status import RunStatus
from orchestrator.storage.backends.location import Location, objects_at
from orchestrator.storage.backends.signed_objects import SigningKey
from orchestrator.storage.backends.signing_keys import run_objects
from orchestrator.storage.objects import Objects


def status_key(term: int) -> str:
    """Key of the status with which this term ended the run: numbers sort as text does."""
    return f"status-{term:010d}.json"


def status_keys(objects: Objects) -> list[str]:
    """Keys of all final statuses, by term. Raises OSError."""
    return [name for name in objects.names("") if re.fullmatch(r"status-\d{10}\.json", name)]


def read_status(location: Location, key: SigningKey | None = None) -> RunStatus:
    """The run's final status.

    Args:
        key: with which its records are signed; None for the one that this process knows, if any.

    Raises:
        NotFound: it has not ended.
        StorageError: its file is no JSON.
        OSError: it can't be read.
    """
    objects = run_objects(location, key=key)
    name = _newest(objects)
    if name is None:
        raise NotFound(f"{location} holds no status-*.json since the run was begun or resumed: no run has ended there")
    try:
        plain = json.loads(objects.get(name))
    except ValueError as error:
        raise StorageError(
            f"{location / name} can't be read: {error}",
            remedy=f"Restore it from a copy of run storage; `orchestrator events {location.name}` shows the end too.",
            unchanged="Nothing was changed.",
        ) from error
    return from_plain(RunStatus, plain)


def has_ended(location: Location) -> bool:
    """Whether a run has ended there, and was not resumed since. Raises OSError."""
    return _newest(objects_at(location)) is not None


def note_resumed(objects: Objects, term: int) -> None:
    """Let no status of an earlier term count: the run goes on. Raises OSError."""
    objects.create(f"resumed-{term:010d}", b"")


def _newest(objects: Objects) -> str | None:
    """Key of the final status, unless the run was resumed in a later term."""
    statuses = status_keys(objects)
    resumed = [name for name in objects.names("") if re.fullmatch(r"resumed-\d{10}", name)]
    if not statuses or (resumed and _term(statuses[-1]) < _term(resumed[-1])):
        return None
    return statuses[-1]


def _term(name: str) -> int:
    return int(name.removesuffix(".json").rpartition("-")[2])
