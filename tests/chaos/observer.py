"""Observer of a run from its storage, while it goes on: its journal's chain, and the checkpoints that must be there."""

import threading
import time
from pathlib import Path

from tests.chaos.checkpoints import broken_promises, promised
from tests.chaos.invariants import records_of
from tests.chaos.job import KEEP_LAST
from tests.chaos.journal import Event, Follower

LOOK_EVERY_S = 0.5
LOOKS = 3  # at checkpoints, as the journal is read before they are


class Observer:
    """Looks every half second in a thread of its own. A context manager."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._follower = Follower(run_dir)
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._faults: list[str] = []
        self.num_verified = 0  # checkpoints, each as often as it was looked at
        self.step = -1  # the newest committed one
        self.last_look_s = time.monotonic()

    def __enter__(self) -> "Observer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(60.0)

    @property
    def events(self) -> list[Event]:
        """All events so far."""
        with self._lock:
            return list(self._follower.chain.events)

    @property
    def term(self) -> int:
        return self._follower.chain.term

    def members(self) -> tuple[str, ...]:
        """The current generation's, by rank."""
        activated = [event for event in self.events if event["kind"] == "activated"]
        return tuple(activated[-1]["members"]) if activated else ()

    def keeper(self) -> tuple[str, ...]:
        """The standby that keeps a lone member's snapshots, if there is one."""
        known = [event for event in self.events if event["kind"] in ("keeper_connected", "keeper_lost", "activated")]
        return (known[-1]["worker"],) if known and known[-1]["kind"] == "keeper_connected" else ()

    def new_faults(self) -> list[str]:
        """What it has found since the last call."""
        with self._lock:
            chain = self._follower.chain
            found = [*chain.faults, *self._faults]
            chain.faults, self._faults = [], []
        if self._thread.ident is not None and not self._thread.is_alive() and not self._done.is_set():
            found.append("the observer has ended")
        return found

    def _watch(self) -> None:
        while not self._done.wait(LOOK_EVERY_S):
            self._look()
            broken = self._broken()
            with self._lock:
                self._faults += broken

    def _look(self) -> None:
        with self._lock:
            self._follower.look()
            newest = [event for event in self._follower.chain.events if event["kind"] == "steps"][-1:]
        for record in records_of(newest):
            self.step = record["step"]
        self.last_look_s = time.monotonic()

    def _broken(self) -> list[str]:
        """Promised checkpoints that aren't good, though the journal, read again, still promises them."""
        broken: list[str] = []
        for _ in range(LOOKS):
            named = promised(self.events, KEEP_LAST)
            broken = broken_promises(self._run_dir, named)
            if not broken:
                self.num_verified += len(named)
                return []
            time.sleep(LOOK_EVERY_S)
            self._look()
        return broken
