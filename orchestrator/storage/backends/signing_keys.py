"""Keys with which runs are signed, as this process knows them: those that it holds, and files of this machine's user.

    $ORCHESTRATOR_HOME/keys/own     made for the first job with `signing_key: auto`
    $ORCHESTRATOR_HOME/keys/…       keys of other machines, to read their runs; a key's id is found by its content

A key is the text of its file, or of its environment variable, without white space around it. What a job in run storage
names as its key is no source of keys: who can write there could name a file or a variable whose content they know.
"""

import json
import os
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from orchestrator.errors import NotAllowed, UsageError
from orchestrator.storage.atomic import create_atomically
from orchestrator.storage.backends.home import home
from orchestrator.storage.backends.location import Location, objects_at
from orchestrator.storage.backends.signed_objects import (
    ADOPTED,
    SHORTEST,
    SignedObjects,
    SigningKey,
    key_id_of,
    newest_adopter,
    unknown_key,
)
from orchestrator.storage.caller import CalledObjects, Caller, call_here
from orchestrator.storage.chain import entry_key, list_names, state_key
from orchestrator.storage.objects import Objects

AUTO, OWN = "auto", "own"
LARGEST = 64 * 2**10  # bytes of a key's file
_HELD = "ORCHESTRATOR_SIGNING_KEYS"  # environment variable with the keys that are held, for processes started here

KeySource = Callable[[Location], SigningKey | None]

_sources: list[KeySource] = []


def run_objects(
    run_dir: Location, caller: Caller = call_here, key: SigningKey | None = None, names_key: bool | None = None
) -> SignedObjects:
    """The records of a run: its journal and its final statuses. Their signatures are verified, if there are any.

    Args:
        caller: makes the calls to run storage.
        key: of the run; None for the one that this process knows.
        names_key: whether its job names one; None: the job is read where that matters.
    """
    objects, signer = CalledObjects(objects_at(run_dir), caller), key or signer_of(run_dir)

    def is_signed() -> bool:
        """A run is that was adopted, or whose job names a key."""
        return (_names_key(objects) if names_key is None else names_key) or bool(objects.names(ADOPTED))

    return SignedObjects(objects, run_dir.name, signer, _in_home, is_signed)


def hold_key(run_dir: Location, key: SigningKey) -> None:
    """Let this process, and those that it starts, sign and verify a run's records with a key."""
    os.environ[_HELD] = json.dumps({**_held(), str(run_dir): key.secret.hex()})


def signer_of(run_dir: Location) -> SigningKey | None:
    """The run's key; None if this process doesn't know of any."""
    secret = _held().get(str(run_dir))
    if secret is not None:
        return SigningKey(bytes.fromhex(secret))
    return next((key for source in _sources if (key := source(run_dir)) is not None), None)


def add_key_source(source: KeySource) -> None:
    """Let a function be asked for the key of a run."""
    if source not in _sources:
        _sources.append(source)


def read_key(reference: str) -> SigningKey:
    """The key of `auto`, `file:PATH` or `env:NAME` on this machine. `auto` makes one.

    Raises:
        UsageError: there is none, or it is too short.
        NotAllowed: others may read its file.
    """
    kind, _, where = reference.partition(":")
    if kind == "env":
        return _key_of(os.environ.get(where, ""), f"the environment variable {where}")
    return _own_key() if kind == AUTO else _read_file(Path(where))


def key_to_resume(run_dir: Location, reference: str | None) -> SigningKey | None:
    """The key with which a run goes on: the one that is named, else that which adopted it last, else the one that this
    process knows, else that of the journal's newest object. None if it isn't signed.

    Args:
        reference: as for `read_key`.

    Raises:
        KeyUnknown: the journal is signed with a key that this process doesn't have.
        UsageError, NotAllowed: the named key can't be used.
    """
    if reference is not None:
        return read_key(reference)
    objects, known = objects_at(run_dir), signer_of(run_dir)
    names = list_names(objects)
    newest = entry_key(names.newest) if names.newest > names.newest_state else state_key(names.newest_state)
    signed_by = newest_adopter(objects) or (key_id_of(objects.get(newest)) if names.newest >= 0 else "")
    if known is not None and (known.id == signed_by or not signed_by):
        return known
    if not signed_by:
        return None
    found = _in_home(signed_by)
    if found is None:
        raise unknown_key(run_dir.name, newest, signed_by)
    return found


def _held() -> dict[str, str]:
    held: dict[str, str] = json.loads(os.environ.get(_HELD, "{}"))
    return held


def _names_key(objects: Objects) -> bool:
    """Whether a run's job names a key. One that can't be read names none."""
    try:
        job = json.loads(objects.get("job.json"))
    except (FileNotFoundError, ValueError):
        return False
    return isinstance(job, dict) and job.get("signing_key") is not None


def _in_home(key_id: str) -> SigningKey | None:
    """The key of this id among the files of this machine's user. Raises NotAllowed if it isn't there, but a file that
    others may read, which might have it."""
    folder, refused = home() / "keys", list[NotAllowed]()
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        try:
            with suppress(UsageError):  # it is no key
                if (key := _read_file(path)).id == key_id:
                    return key
        except NotAllowed as error:
            refused.append(error)
    if refused:
        raise refused[0]
    return None


def _own_key() -> SigningKey:
    path = home() / "keys" / OWN
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not path.exists():
        with suppress(FileExistsError):  # by another process, just now
            create_atomically(path, secrets.token_hex(32).encode(), mode=0o600)
    return _read_file(path)


def _read_file(path: Path) -> SigningKey:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST:
            raise _unreadable(path, f"it is no file of {LARGEST // 2**10} KiB or less")
        is_fixed = os.statvfs(path).f_flag & os.ST_RDONLY  # as secrets of containers are mounted
        if stat.S_IMODE(found.st_mode) & 0o077 and not is_fixed:
            raise NotAllowed(
                f"signing key {path} may be read by others (mode {stat.S_IMODE(found.st_mode):04o})",
                remedy=f"`chmod 600 {path}`; if others may have read it, sign with another one (`checkpoint adopt`).",
                unchanged="Nothing was changed.",
            )
        return _key_of(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, str(error.strerror) if isinstance(error, OSError) else "it is not UTF-8") from None


def _unreadable(path: Path, reason: str) -> UsageError:
    return UsageError(
        f"signing key {path} can't be read on this machine: {reason}",
        remedy="Put the key there, or name its file: --key-file FILE.",
        unchanged="Nothing was changed.",
    )


def _key_of(text: str, where: str) -> SigningKey:
    secret = text.strip().encode()
    if len(secret) < SHORTEST:
        raise UsageError(
            f"the signing key of {where} has {len(secret)} bytes; it must have {SHORTEST} or more",
            remedy="`openssl rand -hex 32` makes one.",
            unchanged="Nothing was changed.",
        )
    return SigningKey(secret)
