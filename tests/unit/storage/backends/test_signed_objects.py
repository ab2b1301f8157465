"""Signed records: what isn't signed with the run's key is refused, and a journal of signed entries is a journal."""

from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import JournalCorrupt, KeyUnknown, TermSuperseded
from orchestrator.storage.backends.signed_objects import (
    SignedObjects,
    SigningKey,
    UnverifiedObjects,
    adopt,
    key_id_of,
)
from orchestrator.storage.chain import entry_key
from orchestrator.storage.directory import DirectoryObjects
from orchestrator.storage.journal import Journal, newest_term, read_events

OURS, THEIRS = SigningKey(b"our own key of 24 bytes."), SigningKey(b"another key of 24 bytes.")


@pytest.fixture
def stored(tmp_path: Path) -> DirectoryObjects:
    """The objects as they are in storage."""
    return DirectoryObjects(tmp_path)


def signed_by(stored: DirectoryObjects, key: SigningKey | None, run_id: str = "demo") -> SignedObjects:
    return SignedObjects(stored, run_id, key, lambda _: None)


def reading(stored: DirectoryObjects, *keys: SigningKey) -> SignedObjects:
    """As a reader has them who doesn't know which key the run has."""
    return SignedObjects(stored, "demo", None, {key.id: key for key in keys}.get)


def test_what_was_signed_is_read_without_its_signature(stored: DirectoryObjects) -> None:
    objects = signed_by(stored, OURS)
    for data in (b"", b"data", b"\nsigned ", b"x" * 89, b"x" * 90):
        key = f"a/{len(data)}"
        assert objects.create(key, data) == objects.create(key, data) == objects.get(key) == data
        assert key_id_of(stored.get(key)) == OURS.id and reading(stored, THEIRS, OURS).get(key) == data
    assert objects.create("a/4", b"other") == b"data"
    assert objects.names("a") == stored.names("a")
    objects.delete(["a/4"])
    with pytest.raises(FileNotFoundError):
        objects.get("a/4")


def test_a_key_is_not_shown() -> None:
    assert "our own" not in repr(OURS) and "our own" not in OURS.id and OURS.id != THEIRS.id


def test_an_object_of_another_key_is_refused(stored: DirectoryObjects) -> None:
    signed_by(stored, THEIRS).create("a", b"data")
    for objects in (signed_by(stored, OURS), reading(stored, OURS)):
        with pytest.raises(KeyUnknown, match=rf"a of run demo was signed with key {THEIRS.id}.*--key-file"):
            objects.get("a")
    with pytest.raises(KeyUnknown):
        signed_by(stored, OURS).create("a", b"data")
    assert reading(stored, THEIRS).get("a") == b"data"


def test_an_unsigned_object_is_refused_if_the_run_has_a_key(stored: DirectoryObjects) -> None:
    stored.create("a", b"data")
    with pytest.raises(JournalCorrupt, match="a isn't signed, and the run has a key.*checkpoint adopt"):
        signed_by(stored, OURS).get("a")
    assert reading(stored, OURS).get("a") == signed_by(stored, None).get("a") == b"data"


def _flipped(text: bytes) -> bytes:
    return bytes([text[0] ^ 1]) + text[1:]


@pytest.mark.parametrize(
    "change",
    [
        lambda stored, _: _flipped(stored),
        lambda stored, _: stored[:-2] + (b"0" if stored[-2:-1] != b"0" else b"1") + b"\n",
        lambda _, another: another,
    ],
    ids=["data", "signature", "another object's"],
)
def test_a_changed_object_is_refused(stored: DirectoryObjects, change: Callable[[bytes, bytes], bytes]) -> None:
    objects = signed_by(stored, OURS)
    objects.create("a", b"data")
    objects.create("b", b"other")
    changed = change(stored.get("a"), stored.get("b"))
    stored.delete(["a"])
    stored.create("a", changed)
    for reader in (objects, reading(stored, OURS)):
        with pytest.raises(JournalCorrupt, match=f"a was changed: its signature isn't that of key {OURS.id}"):
            reader.get("a")


def test_records_of_another_run_are_refused(stored: DirectoryObjects) -> None:
    signed_by(stored, OURS, "other").create("a", b"data")
    with pytest.raises(JournalCorrupt, match="a was changed"):
        signed_by(stored, OURS).get("a")


@pytest.mark.parametrize("before", [THEIRS, None], ids=["another key", "no key"])
def test_adopted_records_count_as_signed_until_they_change(stored: DirectoryObjects, before: SigningKey | None) -> None:
    Journal(signed_by(stored, before)).append([{"kind": "one"}])
    with pytest.raises((KeyUnknown, JournalCorrupt)):
        read_events(signed_by(stored, OURS))
    assert adopt(stored, "demo", OURS) == 2
    journal = Journal(signed_by(stored, OURS))
    journal.append([{"kind": "two"}])
    assert [event["kind"] for event in read_events(signed_by(stored, OURS))] == ["one", "two"]
    assert [event["kind"] for event in read_events(reading(stored, OURS))] == ["one", "two"]
    changed = stored.get(entry_key(1)).replace(b"one", b"ten")
    stored.delete([entry_key(1)])
    stored.create(entry_key(1), changed)
    with pytest.raises((KeyUnknown, JournalCorrupt)):
        read_events(signed_by(stored, OURS))


def test_an_adoption_with_another_key_counts_for_nothing(stored: DirectoryObjects) -> None:
    stored.create("journal/0000000000", b"{}")
    adopt(stored, "demo", THEIRS)
    with pytest.raises(JournalCorrupt, match="isn't signed"):
        signed_by(stored, OURS).get("journal/0000000000")


def test_a_writer_of_another_key_takes_no_term(stored: DirectoryObjects) -> None:
    Journal(signed_by(stored, OURS)).append([{"kind": "one"}])
    before = stored.names("journal")
    for other in (signed_by(stored, THEIRS), signed_by(stored, None)):
        with pytest.raises(KeyUnknown):
            Journal(other)
    assert stored.names("journal") == before


@pytest.mark.parametrize("other", [THEIRS, None], ids=["another key", "no key"])
def test_a_writer_is_superseded_by_one_whose_entries_it_can_t_verify(
    stored: DirectoryObjects, other: SigningKey | None
) -> None:
    ours = Journal(signed_by(stored, OURS))
    ours.append([{"kind": "one"}])
    foreign = signed_by(stored, other)
    foreign.create(entry_key(2), UnverifiedObjects(stored, "demo").get(entry_key(1)))
    for _ in range(2):
        with pytest.raises(TermSuperseded, match="a writer that isn't known") as raised:
            ours.append([{"kind": "two"}])
        assert raised.value.cluster == "unknown"
    assert newest_term(UnverifiedObjects(stored, "demo")) == 1
