"""Keys with which runs are signed, as this process knows them: those that it holds, and files of this machine's user.

    $ORCHESTRATOR_HOME/keys/own     made for the first job with `signing_key: auto`
    $ORCHESTRATOR_HOME/keys/…       keys of other machines, to read their runs; a key's id is found by its content

A key is the text of its file, or of its environment variable, without white space around it.
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
    unknown_key,
)
from orchestrator.storage.caller import CalledObjects, Caller, call_here
from orchestrator.storage.chain import entry_key, list_names, state_key

AUTO, OWN = "auto", "own"
_HELD = "ORCHESTRATOR_SIGNING_KEYS"  # environment variable with the keys that are held, for processes started here

_sources: list[Callable[[str], SigningKey | None]] = []


def run_objects(run_dir: Location, caller: Caller = call_here, key: SigningKey | None = None) -> SignedObjects:
    """The records of a run: its journal and its final statuses. Their signatures are verified, if there are any.

    Args:
        caller: makes the calls to run storage.
        key: of the run; None for the one that this process knows.
    """
    objects, signer = CalledObjects(objects_at(run_dir), caller), key or signer_of(run_dir.name)
    return SignedObjects(objects, run_dir.name, signer, lambda key_id: _find(run_dir, key_id))


def hold_key(run_id: str, key: SigningKey) -> None:
    """Let this process, and those that it starts, sign and verify a run's records with a key."""
    os.environ[_HELD] = json.dumps({**_held(), run_id: key.secret.hex()})


def signer_of(run_id: str) -> SigningKey | None:
    """The run's key; None if this process doesn't know of any."""
    secret = _held().get(run_id)
    if secret is not None:
        return SigningKey(bytes.fromhex(secret))
    return next((key for source in _sources if (key := source(run_id)) is not None), None)


def add_key_source(source: Callable[[str], SigningKey | None]) -> None:
    """Let a function be asked for the key of a run, by its name."""
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
    return _own_key() if kind == AUTO else read_key_file(Path(where))


def read_key_file(path: Path) -> SigningKey:
    """The key in a file. Raises as `read_key`."""
    try:
        mode, text = stat.S_IMODE(path.stat().st_mode), path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(
            f"signing key {path} can't be read on this machine: {reason}",
            remedy="Put the key there, or name its file: --key-file FILE.",
            unchanged="Nothing was started.",
        ) from None
    if mode & 0o077:
        raise NotAllowed(
            f"signing key {path} may be read by others (mode {mode:04o})",
            remedy=f"`chmod 600 {path}`; if others may have read it, sign with another one (`checkpoint adopt`).",
            unchanged="Nothing was started.",
        )
    return _key_of(text, str(path))


def key_to_resume(run_dir: Location, key_file: Path | None) -> SigningKey | None:
    """The key with which a run goes on: of the named file, else the one that this process knows, else one that has
    signed or adopted the journal, else that of the job. None if it isn't signed.

    Raises:
        KeyUnknown: the journal is signed with a key that isn't at hand.
        UsageError, NotAllowed: the named file can't be used.
    """
    if key_file is not None:
        return read_key_file(key_file)
    if (known := signer_of(run_dir.name)) is not None:
        return known
    newest, key_id = _newest_signature(run_dir)
    adopters = [name.partition("-")[0] for name in objects_at(run_dir).names(ADOPTED)]
    found = (_find(run_dir, one) for one in (key_id, *adopters) if one)
    if (key := next((key for key in found if key is not None), None)) is not None:
        return key
    if key_id:
        raise unknown_key(run_dir.name, newest, key_id)
    reference = _reference_of(run_dir)
    return None if reference is None else read_key(reference)


def _newest_signature(run_dir: Location) -> tuple[str, str]:
    """Key of the journal's newest object, and id of the key that it was signed with; empty without any."""
    objects = objects_at(run_dir)
    names = list_names(objects)
    if names.newest < 0:
        return "", ""
    key = entry_key(names.newest) if names.newest > names.newest_state else state_key(names.newest_state)
    return key, key_id_of(objects.get(key))


def _held() -> dict[str, str]:
    held: dict[str, str] = json.loads(os.environ.get(_HELD, "{}"))
    return held


def _find(run_dir: Location, key_id: str) -> SigningKey | None:
    """The key of this id among the files of this machine's user, or the one that the run's job names."""
    folder = home() / "keys"
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        with suppress(UsageError, NotAllowed):  # it isn't the one, as far as is known
            if (key := read_key_file(path)).id == key_id:
                return key
    reference = _reference_of(run_dir)
    if reference is not None and reference != AUTO:
        with suppress(UsageError, NotAllowed):
            if (key := read_key(reference)).id == key_id:
                return key
    return None


def _reference_of(run_dir: Location) -> str | None:
    """The job's `signing_key`. A job that can't be read has none."""
    try:
        reference = json.loads(objects_at(run_dir).get("job.json")).get("signing_key")
    except (FileNotFoundError, ValueError, AttributeError):
        return None
    return reference if isinstance(reference, str) else None


def _own_key() -> SigningKey:
    path = home() / "keys" / OWN
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not path.exists():
        with suppress(FileExistsError):  # by another process, just now
            create_atomically(path, secrets.token_hex(32).encode(), mode=0o600)
    return read_key_file(path)


def _key_of(text: str, where: str) -> SigningKey:
    secret = text.strip().encode()
    if len(secret) < SHORTEST:
        raise UsageError(
            f"the signing key of {where} has {len(secret)} bytes; it must have {SHORTEST} or more",
            remedy="`openssl rand -hex 32` makes one.",
            unchanged="Nothing was started.",
        )
    return SigningKey(secret)
