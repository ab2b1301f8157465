"""What a controller makes of what it hears from the rendezvous store."""

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cluster.inbox import Inbox
from orchestrator.controller.services import rendezvous_client
from orchestrator.controller.services.rendezvous_client import RendezvousClient
from orchestrator.protocol.messages import StoreAddress


@pytest.fixture
def link(tmp_path: Path) -> RendezvousClient:
    made = RendezvousClient("run", tmp_path, "nobody:Nothing", Inbox())
    made._host = object()  # it was asked
    return made


def _answer(value: Any) -> "Future[Any]":
    future: Future[Any] = Future()
    if isinstance(value, Exception):
        future.set_exception(value)
    else:
        future.set_result(value)
    return future


def test_a_store_that_died_has_no_address_until_it_is_back(link: RendezvousClient) -> None:
    link._located(_answer(("10.0.0.1", 4321)))
    assert link.address == StoreAddress("10.0.0.1", 4321)
    link._held(_answer(RuntimeError("its process ended")))
    assert link.address is None and not link.fault
    link._located(_answer(("10.0.0.1", 4321)))  # of the dead one, late
    assert link.address is None
    link._host = object()  # it is asked again
    link._located(_answer(("10.0.0.1", 9999)))
    assert link.address == StoreAddress("10.0.0.1", 9999)


def test_a_store_that_another_controller_holds_is_still_there(link: RendezvousClient) -> None:
    link._located(_answer(("10.0.0.1", 4321)))
    link._held(_answer(None))
    assert link.address is not None


def test_a_store_that_never_starts_is_a_fault_with_its_reason(
    link: RendezvousClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous_client, "GIVE_UP_S", 0.0)
    link._located(_answer(RuntimeError("no port is free")))
    assert not link.fault
    link._host = object()
    link._located(_answer(RuntimeError("no port is free")))
    assert link.fault == "the rendezvous store failed: no port is free"
