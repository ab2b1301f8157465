"""Signed records: what isn't signed with the run's key is refused, and a journal of signed entries is a journal."""

from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import JournalCorrupt, KeyUnknown, TermSuperseded
from orchestrator.storage.backends.signed_objects import (
    ADOPTED,
    SignedObjects,
    SigningKey,
    adopt,
    digests_of,
    key_id_of,
    newest_adopter,
)
from orchestrator.storage.chain import entry_key
from orchestrator.storage.directory import DirectoryObjects
from orchestrator.storage.journal import Journal, read_events

OURS, THEIRS = SigningKey(b"our own key of 24 bytes."), SigningKey(b"another key of 24 bytes.")


@pytest.fixture
def stored(tmp_path: Path) -> DirectoryObjects:
    """The objects as they are in storage."""
    return DirectoryObjects(tmp_path)


def signed_by(stored: DirectoryObjects, key: SigningKey | None, run_id: str = "demo") -> SignedObjects:
    return SignedObjects(stored, run_id, key, lambda _: None)


def reading(stored: DirectoryObjects, *keys: SigningKey) -> SignedObjects:
    """As a reader has them who doesn't know which key the run has."""
    return SignedObjects(stored, "demo", None, {key.id: key for key in keys}.get, lambda: bool(stored.names(ADOPTED)))


def adopted_by(stored: DirectoryObjects, key: SigningKey) -> int:
    digests = digests_of(stored)
    adopt(stored, "demo", key, digests)
    return len(digests)


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
    for objects in (signed_by(stored, OURS), SignedObjects(stored, "demo", None, is_signed=lambda: True)):
        with pytest.raises(JournalCorrupt, match="a isn't signed, and the run is.*checkpoint adopt"):
            objects.get("a")
    assert reading(stored, OURS).get("a") == signed_by(stored, None).get("a") == b"data"


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_without_a_key_an_unsigned_object_beside_signed_ones_is_refused(stored: DirectoryObjects, order: str) -> None:
    signed_by(stored, OURS).create("a", b"data")
    stored.create("b", b"data")
    objects = reading(stored, OURS)
    objects.get(order[0])
    with pytest.raises(JournalCorrupt, match="b isn't signed, and the run is|a is signed, and other"):
        objects.get(order[1])


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
    assert adopted_by(stored, OURS) == 2 and newest_adopter(stored) == OURS.id
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
    adopted_by(stored, THEIRS)
    with pytest.raises(JournalCorrupt, match="isn't signed"):
        signed_by(stored, OURS).get("journal/0000000000")


def test_a_writer_of_another_key_takes_no_term(stored: DirectoryObjects) -> None:
    Journal(signed_by(stored, OURS)).append([{"kind": "one"}])
    before = stored.names("journal")
    for other in (signed_by(stored, THEIRS), signed_by(stored, None)):
        with pytest.raises(KeyUnknown):
            Journal(other)
    assert stored.names("journal") == before


def test_the_newest_adopter_is_the_one_of_the_longest_journal(stored: DirectoryObjects) -> None:
    assert newest_adopter(stored) == ""
    journal = Journal(signed_by(stored, None))
    adopted_by(stored, THEIRS)
    journal.append([{"kind": "one"}])
    adopted_by(stored, OURS)
    assert newest_adopter(stored) == OURS.id


def test_a_writer_is_superseded_by_one_of_another_key(stored: DirectoryObjects) -> None:
    ours = Journal(signed_by(stored, OURS))
    ours.append([{"kind": "one"}])
    signed_by(stored, THEIRS).create(entry_key(2), signed_by(stored, OURS).get(entry_key(1)))
    for _ in range(2):
        with pytest.raises(TermSuperseded, match="a writer that isn't known") as raised:
            ours.append([{"kind": "two"}])
        assert raised.value.cluster == "unknown"


def test_a_writer_fails_at_what_is_no_entry_of_any_writer(stored: DirectoryObjects) -> None:
    ours = Journal(signed_by(stored, OURS))
    stored.create(entry_key(1), b"garbage")
    with pytest.raises(JournalCorrupt, match="journal/0000000001 isn't signed.*delete it if it is the newest object"):
        ours.append([{"kind": "two"}])
    stored.delete([entry_key(1)])
    assert [event["kind"] for event in ours.append([{"kind": "two"}])] == ["two"]
