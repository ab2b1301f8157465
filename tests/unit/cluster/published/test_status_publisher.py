"""A run's status is published at intervals and at changes, until the run ends."""

import re
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from ray.experimental import internal_kv

from orchestrator.cluster.published import status_publisher
from orchestrator.cluster.published.status_publisher import StatusPublisher, publishing_the_last
from orchestrator.cluster.published.status_reader import content_of, status_in
from orchestrator.protocol.codec import to_plain
from tests.unit.cli.statuses import status

PATIENCE_S = 60.0


class Store:
    """Ray's internal key-value store, which may be unreachable."""

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.num_puts, self.is_reachable = 0, True

    def put(self, key: bytes, value: bytes, **_: object) -> None:
        self.num_puts += 1
        if not self.is_reachable:
            raise ConnectionError
        self.values[key] = value

    def get(self, key: bytes, **_: object) -> bytes | None:
        return self.values.get(key)

    def remove(self, key: bytes, **_: object) -> None:
        self.values.pop(key, None)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store()
    monkeypatch.setattr(internal_kv, "_internal_kv_put", store.put)
    monkeypatch.setattr(internal_kv, "_internal_kv_get", store.get)
    monkeypatch.setattr(internal_kv, "_internal_kv_del", store.remove)
    return store


@pytest.fixture
def publisher(store: Store) -> Iterator[StatusPublisher]:
    publisher = StatusPublisher("try", lambda: status(step=store.num_puts))
    yield publisher
    publisher.close()


def await_true(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_it_is_published_again_and_again(
    store: Store, publisher: StatusPublisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_publisher, "EVERY_S", 0.01)
    publisher.start()
    await_true(lambda: store.num_puts >= 3)
    assert status_in(store.values[b"try"])[0]["step"] >= 1


def test_a_change_of_the_state_is_published_at_once(
    store: Store, publisher: StatusPublisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_publisher, "EVERY_S", 10 * PATIENCE_S)
    first, second = object(), object()
    publisher.note(first)
    publisher.start()
    await_true(lambda: store.num_puts == 2)  # at the start, and for the state that was noted before
    publisher.note(first)
    assert not publisher._changed.is_set()
    publisher.note(second)
    await_true(lambda: store.num_puts == 3)


def test_after_the_end_nothing_is_published(
    store: Store, publisher: StatusPublisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_publisher, "EVERY_S", 0.01)
    earlier = set(threading.enumerate())  # those of other tests may not have ended yet
    publisher.start()
    await_true(lambda: store.num_puts >= 1)
    (thread,) = (thread for thread in set(threading.enumerate()) - earlier if thread.name == "status")
    publisher.close()
    num_puts = store.num_puts
    thread.join(PATIENCE_S)
    assert not thread.is_alive() and store.values == {} and store.num_puts == num_puts


def test_it_continues_after_an_outage_of_the_head(
    store: Store, publisher: StatusPublisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_publisher, "EVERY_S", 0.01)
    store.is_reachable = False
    publisher.start()
    await_true(lambda: store.num_puts >= 3)
    assert store.values == {}
    store.is_reachable = True
    await_true(lambda: b"try" in store.values)


def test_the_last_one_is_published_while_another_controller_starts(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_publisher, "EVERY_S", 0.01)
    before = to_plain(status(step=7, as_of_time=5.0))
    store.values[b"try"] = content_of(before, time.time() - 5.0)
    began = time.time()
    with publishing_the_last("try"):
        await_true(lambda: store.num_puts > 2)
    puts = store.num_puts
    found, published_time = status_in(store.values[b"try"])
    assert published_time >= began and re.search(r"has waited \d+ s for run storage", found["warning"])
    assert {**found, "warning": before["warning"]} == before
    store.values[b"old"] = content_of(before, time.time() - 100.0)
    for run in ("old", "a run that has published none"):
        with publishing_the_last(run):
            time.sleep(0.05)
    assert store.num_puts == puts


@pytest.mark.parametrize("content", [b"{}", b"[]", b"no JSON", b'{"published_time": null, "status": {}}'])
def test_what_is_no_published_status_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError):
        status_in(content)
