"""The member's connection to its keeper: offered, taken, and ended once the keeper is gone."""

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.world import World
from orchestrator.protocol.messages import Directive, GenerationPlan, Keeper, StoreAddress
from orchestrator.spec.fault_tolerance import ProtectionSpec
from orchestrator.worker.runtime.mailbox import WorkerMailbox
from orchestrator.worker.transition import keeper_link
from orchestrator.worker.transition.keeper_link import KeeperLink
from orchestrator.worker.transition.snapshots import SnapshotManager

WAIT_S = 60.0
STORE = StoreAddress("", 0)
KEEPER = Keeper(3, "b", 4, STORE, "1/keeper/3", 3)
PLAN = GenerationPlan(1, World(4, ("a",)), ExpertPlacement.balanced(2, 1), None, "1/4", STORE)


class _Connection:
    def __init__(self) -> None:
        self.is_shut, self.is_closed = threading.Event(), threading.Event()

    def shut(self) -> None:
        self.is_shut.set()

    def close(self) -> None:
        self.is_closed.set()


class _Member:
    """A lone member whose keeper is connected."""

    def __init__(self) -> None:
        self.mailbox, self.connection, self._seq = WorkerMailbox("a", 1), _Connection(), 0
        connections = [self.connection, _Connection()]
        factory: Any = SimpleNamespace(me="a", protect_alone=lambda *args: connections.pop(0))
        self.link = KeeperLink(factory, self.mailbox, SnapshotManager("a", ProtectionSpec(every=1), last_step=99))
        self.direct(KEEPER)
        self.mailbox.wait(lambda directive: self.link._ready is not None, WAIT_S)
        assert self.link._ready is not None

    def direct(self, *keepers: Keeper, aborted: int = -1) -> None:
        self._seq += 1
        self.mailbox.put(Directive(1, self._seq, current=PLAN, activated=4, aborted=aborted, keepers=keepers))


@pytest.fixture
def member(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Member]:
    monkeypatch.setattr(keeper_link, "connect_store", lambda host, port: None)
    member = _Member()
    yield member
    member.link.close()


def test_a_connection_in_use_is_shut_once_its_keeper_is_named_no_longer(member: _Member) -> None:
    assert member.link.take(4) == (KEEPER, member.connection)
    member.direct(KEEPER, Keeper(4, "c", 4, STORE, "1/keeper/4", 3))
    assert not member.connection.is_shut.wait(0.1)
    member.direct()
    assert member.connection.is_shut.wait(WAIT_S) and not member.connection.is_closed.is_set()


@pytest.mark.parametrize("is_aborted", [False, True], ids=["named no longer", "aborted"])
def test_a_connection_that_was_never_taken_is_closed_with_its_keeper(member: _Member, is_aborted: bool) -> None:
    if is_aborted:
        member.direct(KEEPER, aborted=4)
    else:
        member.direct()
    assert member.connection.is_closed.wait(WAIT_S)
    assert member.link.take(4) is None
