"""A journal in a bucket whose requests are lost, repeated, late or refused, with several controllers at once."""

import random
from contextlib import suppress

import pytest

from orchestrator.errors import JournalCorrupt, TermSuperseded
from orchestrator.storage.backends.bucket_objects import BucketObjects
from orchestrator.storage.backends.patience import Patience
from orchestrator.storage.chain import Event, list_names
from orchestrator.storage.chain_reader import newest_term
from orchestrator.storage.journal import Journal, read_events
from orchestrator.storage.tasks import run_inline
from tests.support.journals import DUE, check_journal, compaction
from tests.support.request_proxy import RequestFault, RequestProxy

PATIENCE = Patience(answer_s=5.0, upload_s=10.0, retry_s=30.0)
SHORT = Patience(answer_s=5.0, upload_s=10.0, retry_s=0.2)
FAULTS = (
    RequestFault.LOST_REQUEST,
    RequestFault.LOST_REPLY,
    RequestFault.LATE_DUPLICATE,
    RequestFault.LATE_REQUEST,
    RequestFault.CONFLICT,
    RequestFault.UNAVAILABLE,
    RequestFault.UNAVAILABLE_DONE,
)


@pytest.fixture
def url(bucket: tuple[str, RequestProxy], request: pytest.FixtureRequest) -> str:
    return f"{bucket[0]}/{abs(hash(request.node.name))}"


class BucketWriter:
    """A controller's journal, and all events that were appended by any."""

    def __init__(self, url: str, written: list[Event], patience: Patience = PATIENCE) -> None:
        self.objects, self.written = BucketObjects(url, patience), written
        self.journal = Journal(self.objects)

    def append(self) -> None:
        self.written += self.journal.append([{"kind": "step", "n": len(self.written)}])

    def compact(self) -> None:
        run_inline(compaction(self.objects, self.journal.last))

    def refuses(self) -> None:
        with pytest.raises(TermSuperseded):
            self.journal.append([{"kind": "step", "n": -1}])


def grown(url: str, entries: int) -> BucketWriter:
    writer = BucketWriter(url, [])
    for number in range(1, entries):
        writer.append()
        if number % DUE == 0:
            writer.compact()
    return writer


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_an_entry_is_appended_once_whatever_happens_to_its_request(
    url: str, proxy: RequestProxy, fault: RequestFault
) -> None:
    writer = BucketWriter(url, [])
    for _ in range(3):
        proxy.fail("PUT", fault)
        writer.append()
    proxy.deliver_late()
    check_journal(writer.objects, writer.written)
    assert newest_term(writer.objects) == 1


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_term_is_taken_once_whatever_happens_to_its_request(
    url: str, proxy: RequestProxy, fault: RequestFault
) -> None:
    old = grown(url, 3)
    proxy.fail("PUT", fault)
    new = BucketWriter(url, old.written)
    assert (old.journal.term, new.journal.term) == (1, 2)
    proxy.deliver_late()
    old.refuses()
    new.append()
    check_journal(new.objects, new.written)


def test_an_entry_that_comes_after_the_next_term_is_refused(url: str, proxy: RequestProxy) -> None:
    """A controller that believes in its term, and whose request is on its way for long."""
    old = BucketWriter(url, [], SHORT)
    old.append()
    with proxy.failing("PUT", RequestFault.LATE_REQUEST), pytest.raises(OSError):
        old.append()
    new = BucketWriter(url, old.written)
    new.append()
    assert set(proxy.deliver_late()) == {412}
    old.refuses()
    check_journal(new.objects, new.written)


@pytest.mark.parametrize("others", [1, 6])
def test_the_past_is_refused_after_compaction(url: str, proxy: RequestProxy, others: int) -> None:
    old = grown(url, 7)
    new = BucketWriter(url, old.written)
    for _ in range(others):
        new.append()
    for _ in range(2):
        new.compact()
    for _ in range(2):
        old.refuses()
    check_journal(new.objects, new.written)


def test_a_request_that_comes_after_its_entry_was_compacted_does_no_harm(url: str, proxy: RequestProxy) -> None:
    """It stores an entry under a name that compaction has freed."""
    writer = BucketWriter(url, [])
    writer.append()
    proxy.fail("PUT", RequestFault.LATE_DUPLICATE)
    writer.append()
    while list_names(writer.objects).newest_state < 2:
        writer.append()
        writer.compact()
    assert "0000000002" not in writer.objects.names("journal")
    assert proxy.deliver_late() == [200]
    assert "0000000002" in writer.objects.names("journal")
    check_journal(writer.objects, writer.written)
    successor = BucketWriter(url, writer.written)
    for _ in range(2 * DUE):
        successor.append()
        successor.compact()
    assert "0000000002" not in writer.objects.names("journal")
    check_journal(successor.objects, successor.written)


@pytest.mark.parametrize("seed", range(3))
def test_every_event_is_present_once_after_any_fault(url: str, proxy: RequestProxy, seed: int) -> None:
    chance, written = random.Random(seed), list[Event]()
    writer, past = BucketWriter(url, written), list[BucketWriter]()
    for _ in range(40):
        for method, faults in (("PUT", FAULTS), ("GET", FAULTS[:2]), ("POST", FAULTS[:2])):
            proxy.fail(method, *chance.choices([None, *faults], [3 * len(faults), *[1] * len(faults)], k=20))
        match chance.choice(["append"] * 5 + ["compact"] * 3 + ["superseded", "past", "late"]):
            case "append":
                writer.append()
            case "compact":
                writer.compact()
            case "superseded":
                past.append(writer)
                writer = BucketWriter(url, written)
            case "late":
                proxy.deliver_late()
            case "past" if past:
                old = chance.choice(past)
                if chance.random() < 0.3:
                    with suppress(OSError, JournalCorrupt):  # it may compact what it knows of, to no harm
                        old.compact()
                old.refuses()
    for method in ("PUT", "GET", "POST"):
        proxy.fail(method)
    proxy.deliver_late()
    check_journal(writer.objects, written)
    for old in past:
        old.refuses()


@pytest.mark.parametrize("seed", range(3))
def test_an_append_that_was_given_up_may_be_there(url: str, proxy: RequestProxy, seed: int) -> None:
    """A controller without patience: whether its entry was stored is found out by its next call."""
    chance, given_up = random.Random(seed), 0
    writer = BucketWriter(url, [], SHORT)
    for number in range(30):
        if chance.random() < 0.5:
            proxy.fail("PUT", RequestFault.UNAVAILABLE_DONE)
            proxy.fail("GET", *[RequestFault.UNAVAILABLE] * 9)
        else:
            proxy.fail("PUT", *chance.choices([None, RequestFault.UNAVAILABLE, RequestFault.LOST_REQUEST], k=4))
        try:
            writer.journal.append([{"kind": "step", "n": number}])
        except OSError:
            given_up += 1
        proxy.forget()
    writer.journal.append([{"kind": "end", "n": 30}])
    events = read_events(writer.objects)
    numbers = [event["n"] for event in events]
    assert given_up > 3 and numbers == sorted(set(numbers)) and numbers[-1] == 30
    assert [event["seq"] for event in events] == list(range(len(events)))
