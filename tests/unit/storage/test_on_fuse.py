"""Objects and journals on a file system whose calls fail, tear writes and flip bits."""

import random
from contextlib import suppress
from itertools import count

import pytest

from orchestrator.errors import JournalCorrupt
from orchestrator.storage.directory import DirectoryObjects
from orchestrator.storage.journal import Journal, read_events
from tests.support.call_faults import CallFault, Effect
from tests.support.fuse_disk import FuseDisk

number = count()
DATA = random.Random(0).randbytes(10_000)
FAULTS = [  # of every call that makes an object
    pytest.param(CallFault(call, effect, nth=1), id=f"{call}-{effect.name}")
    for call, effects in {
        "mkdir": [Effect.ERROR, Effect.LOST_REPLY],
        "create": [Effect.ERROR, Effect.LOST_REPLY],
        "write": [Effect.ERROR, Effect.LOST_REPLY, Effect.TORN],
        "fsync": [Effect.ERROR, Effect.LOST_REPLY],
        "link": [Effect.ERROR, Effect.LOST_REPLY],
        "unlink": [Effect.ERROR, Effect.LOST_REPLY],
        "fsyncdir": [Effect.ERROR, Effect.LOST_REPLY],
    }.items()
    for effect in effects
]


@pytest.fixture
def objects(fuse: FuseDisk) -> DirectoryObjects:
    directory = fuse.path / str(next(number))
    directory.mkdir()
    return DirectoryObjects(directory)


@pytest.mark.parametrize("fault", FAULTS)
def test_an_object_exists_whole_or_not_at_all_after_any_failed_call(
    fuse: FuseDisk, objects: DirectoryObjects, fault: CallFault
) -> None:
    found = None
    with fuse.having(fault):
        with suppress(OSError):
            found = objects.create("x/a", DATA)
        assert fuse.hits() == 1
    is_there = objects.names("x") == ("a",)
    assert found == (DATA if is_there else None)
    assert objects.create("x/a", DATA) == objects.get("x/a") == DATA
    assert objects.create("x/a", b"another") == DATA


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if "mkdir" not in str(fault.id)])
def test_a_journal_continues_after_any_failed_call(fuse: FuseDisk, objects: DirectoryObjects, fault: CallFault) -> None:
    journal = Journal(objects)
    journal.append([{"kind": "a"}])
    expected = "ac"
    with fuse.having(fault):
        with suppress(OSError):
            journal.append([{"kind": "b"}])
            expected = "abc"
        assert fuse.hits() == 1
    journal.append([{"kind": "c"}])
    assert "".join(event["kind"] for event in read_events(objects)) == expected


def test_an_entry_whose_reply_is_lost_is_appended(fuse: FuseDisk, objects: DirectoryObjects) -> None:
    journal = Journal(objects)
    with fuse.having(CallFault("link", Effect.LOST_REPLY)):
        (event,) = journal.append([{"kind": "a"}])
        assert fuse.hits() == 1
    assert read_events(objects) == [event]


def test_an_entry_of_which_a_bit_flips_on_its_way_to_storage_is_named(
    fuse: FuseDisk, objects: DirectoryObjects
) -> None:
    journal = Journal(objects)
    journal.append([{"kind": "a"}])
    with fuse.having(CallFault("write", Effect.FLIPPED)):
        journal.append([{"kind": "b"}])
    journal.append([{"kind": "c"}])
    with pytest.raises(JournalCorrupt, match="journal/0000000002"):
        read_events(objects)


def test_an_entry_of_which_a_bit_flips_as_it_is_read_is_named(fuse: FuseDisk, objects: DirectoryObjects) -> None:
    journal = Journal(objects)
    for kind in "abc":
        journal.append([{"kind": kind}])
    flipped = CallFault("read", Effect.FLIPPED, "*/0000000002")
    with fuse.having(flipped), pytest.raises(JournalCorrupt, match="journal/0000000002"):
        read_events(objects)
