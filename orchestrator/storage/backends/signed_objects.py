"""Signatures of a run's records: what a controller believes can only be written with the run's key.

Each object of a signed run ends with a line that names the key and has the HMAC-SHA256 of the run, the object's key and
the bytes before it. Readers get those bytes once they are verified. Only records are signed: the journal names the
digests of the job and of each checkpoint, whose manifest has those of its files.

A run has one key at a time. To change it, or after it was lost, records are *adopted*: an object that is signed with
the new key lists their digests, and what is listed there counts as signed.

    RUN/adopted/0000000042-KEY-NONCE.json      {"objects": {"journal/0000000042": SHA-256, …}}
"""

import hmac
import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from hashlib import sha256

from orchestrator.errors import JournalCorrupt, KeyUnknown
from orchestrator.storage.chain import FOLDER, list_names
from orchestrator.storage.objects import Objects

SHORTEST = 16  # bytes of a key
ADOPTED = "adopted"
_ID_DIGITS = 16
_TRAILER = re.compile(rb"\nsigned ([0-9a-f]{16}) ([0-9a-f]{64})\n")
_TRAILER_BYTES = len("\nsigned  \n") + _ID_DIGITS + 64


@dataclass(frozen=True)
class SigningKey:
    """A key with which the records of a run are signed.

    Args:
        secret: at least 16 bytes.
    """

    secret: bytes = field(repr=False)

    @property
    def id(self) -> str:
        """Name of the key, from which it can't be found out."""
        return hmac.digest(self.secret, b"orchestrator: id of this key", "sha256").hex()[:_ID_DIGITS]

    def signed(self, run_id: str, key: str, data: bytes) -> bytes:
        """An object's bytes with their signature."""
        return data + f"\nsigned {self.id} {self._mac(run_id, key, data)}\n".encode()

    def has_signed(self, run_id: str, key: str, data: bytes, mac: str) -> bool:
        return hmac.compare_digest(self._mac(run_id, key, data), mac)

    def _mac(self, run_id: str, key: str, data: bytes) -> str:
        return hmac.digest(self.secret, f"{run_id}\0{key}\0".encode() + data, "sha256").hex()


@dataclass(frozen=True)
class _Raw:
    """An object's bytes without the trailer; `key_id` and `mac` are empty if it isn't signed."""

    data: bytes
    key_id: str = ""
    mac: str = ""


def _raw(stored: bytes) -> _Raw:
    found = _TRAILER.fullmatch(stored[-_TRAILER_BYTES:])
    return _Raw(stored[:-_TRAILER_BYTES], found[1].decode(), found[2].decode()) if found else _Raw(stored)


class SignedObjects:
    """Objects of a run whose signatures are verified. New ones are signed if the run has a key.

    Raises, in `get` and `create`:
        KeyUnknown: an object was signed with another key.
        JournalCorrupt: it was changed, or isn't signed though the run is.

    Args:
        signer: the run's key; None if this process doesn't know of any. Then objects may be without a signature, if all
            are.
        find: the key of an id, for objects with one; asked without a `signer` only.
        is_signed: whether the run is signed, as far as is known; asked once, without a `signer` only.
        adopted: digests of objects that count as signed, by key; None for those that were adopted with a known key.
    """

    def __init__(
        self,
        objects: Objects,
        run_id: str,
        signer: SigningKey | None,
        find: Callable[[str], SigningKey | None] = lambda _: None,
        is_signed: Callable[[], bool] = lambda: False,
        adopted: Mapping[str, str] | None = None,
    ) -> None:
        self._objects, self._run_id, self.signer = objects, run_id, signer
        self._find, self._is_signed, self._given = cache(find), cache(is_signed), adopted
        self._found_signed: bool | None = None  # what the objects so far were that weren't adopted

    def create(self, key: str, data: bytes) -> bytes:
        ours = data if self.signer is None else self.signer.signed(self._run_id, key, data)
        found = self._objects.create(key, ours)
        return data if found == ours else self._verified(key, found)

    def get(self, key: str) -> bytes:
        return self._verified(key, self._objects.get(key))

    def names(self, folder: str) -> tuple[str, ...]:
        return self._objects.names(folder)

    def delete(self, keys: Iterable[str]) -> None:
        self._objects.delete(keys)

    def has_adopted(self, key: str, stored: bytes) -> bool:
        """Whether an object, as it is stored, counts as signed because it was adopted. Raises OSError."""
        return self._adopted.get(key) == sha256(stored).hexdigest()

    def _verified(self, key: str, stored: bytes) -> bytes:
        raw = _raw(stored)
        if not raw.key_id and self.signer is None and not self._found_signed and not self._is_signed():
            self._found_signed = False
            return raw.data
        signer = self._key(raw.key_id)
        if signer is not None and not signer.has_signed(self._run_id, key, raw.data, raw.mac):
            raise _refused(key, f"was changed: its signature isn't that of key {raw.key_id}")
        if signer is None and not self.has_adopted(key, stored):
            if not raw.key_id:
                raise _refused(key, "isn't signed, and the run is")
            raise unknown_key(self._run_id, key, raw.key_id)
        if signer is not None:
            if self._found_signed is False:
                raise _refused(key, "is signed, and other records of the run aren't")
            self._found_signed = True
        return raw.data

    def _key(self, key_id: str) -> SigningKey | None:
        if not key_id:
            return None
        if self.signer is None:
            return self._find(key_id)
        return self.signer if self.signer.id == key_id else None

    @cached_property
    def _adopted(self) -> Mapping[str, str]:
        """Digests of the objects that were adopted with a known key, by their keys."""
        if self._given is not None:
            return self._given
        adopted: dict[str, str] = {}
        for name in self._objects.names(ADOPTED):
            key = f"{ADOPTED}/{name}"
            raw = _raw(self._objects.get(key))
            signer = self._key(raw.key_id)
            if signer is not None and signer.has_signed(self._run_id, key, raw.data, raw.mac):
                adopted |= json.loads(raw.data)["objects"]
        return adopted


def digests_of(objects: Objects, others: Iterable[str] = ()) -> dict[str, str]:
    """SHA-256 of a run's journal, object by object, and of other objects, as they are stored. Raises OSError."""
    keys = [*(f"{FOLDER}/{name}" for name in objects.names(FOLDER)), *others]
    return {key: sha256(objects.get(key)).hexdigest() for key in keys}


def adopt(objects: Objects, run_id: str, key: SigningKey, digests: Mapping[str, str]) -> None:
    """Let objects with these digests count as signed with `key`. Raises OSError."""
    newest = list_names(objects).newest
    name = f"{ADOPTED}/{newest:010d}-{key.id}-{secrets.token_hex(8)}.json"
    objects.create(name, key.signed(run_id, name, json.dumps({"objects": dict(digests)}).encode()))


def newest_adopter(objects: Objects) -> str:
    """Id of the key with which the run was adopted last; empty if it never was. Raises OSError."""
    names = [name.split("-") for name in objects.names(ADOPTED)]
    return max(((parts[0], parts[1]) for parts in names if len(parts) == 3), default=("", ""))[1]


def key_id_of(stored: bytes) -> str:
    """Id of the key with which an object, as it is stored, was signed; empty if it wasn't."""
    return _raw(stored).key_id


def _refused(key: str, why: str) -> JournalCorrupt:
    return JournalCorrupt(
        f"{key} {why}",
        remedy="Put the original back, or delete it if it is the newest object and none of the run's. `orchestrator "
        "checkpoint adopt` lets records count as they are.",
        unchanged="Nothing was changed.",
    )


def unknown_key(run_id: str, key: str, key_id: str) -> KeyUnknown:
    """The error for an object that was signed with a key that this process doesn't have."""
    return KeyUnknown(
        f"{key} of run {run_id} was signed with key {key_id}, which was not found",
        remedy="Put its file into $ORCHESTRATOR_HOME/keys; `resume` takes it by --key-file FILE too. If it is lost, "
        "`orchestrator checkpoint adopt` signs the run's records with another key.",
        unchanged="Nothing was changed.",
    )
