"""Protection of one generation: sends this rank's snapshots to its buddy and receives those of its protected rank.

Two threads, beside the one that trains. The first copies the shard (all that the training thread ever waits for before
it changes the state) and sends its own part to the buddy; the second receives the protected rank's. Bytes go from
memory to memory over a separate socket: they are neither pickled nor pass through Ray.
"""

import logging
import threading
import time
from concurrent.futures import Future
from dataclasses import astuple
from queue import SimpleQueue
from typing import Any

from torch._C._distributed_c10d import Store

from orchestrator.comm import traffic_meter
from orchestrator.comm.transport.stream import FramedStream, Listener, StreamClosed, dial
from orchestrator.elastic.state_layout import StateLayout
from orchestrator.protocol.messages import GenerationPlan
from orchestrator.protocol.usage import TrafficKind
from orchestrator.state.buffers import Buffers
from orchestrator.state.ranges import NamedRanges
from orchestrator.state.snapshot import Replay, Snapshot, Update, copy_into
from orchestrator.state.snapshot_store import RankSnapshots, SnapshotStore

log = logging.getLogger("orchestrator.worker")

MEET_S = 60.0  # how long to wait for buddy and protected rank


class SnapshotReplicator:
    """Connects to buddy and protected rank, which do the same. Made in the background while an older world trains.

    Args:
        layout: of the generation's state.
        address: where this worker can be reached.
        pinned: snapshots are of a GPU's memory.
        whole_every: one of so many snapshots is whole, the others are deltas.
        replay: applies the updates of deltas.
        buffers: of this worker, for the snapshots of all its generations.

    Raises:
        StreamClosed: buddy or protected rank did not connect.
    """

    def __init__(
        self,
        store: Store,
        plan: GenerationPlan,
        rank: int,
        layout: StateLayout,
        address: str,
        pinned: bool,
        whole_every: int,
        replay: Replay,
        buffers: Buffers,
    ) -> None:
        self.generation = plan.generation
        buddy, protected_rank = plan.buddies[rank], plan.buddies.index(rank)
        prefix = f"{plan.store_prefix}/protection"
        self._own = RankSnapshots(plan.generation, rank, layout, False, whole_every, replay, pinned, buffers)
        self._kept = RankSnapshots(plan.generation, protected_rank, layout, True, whole_every, replay, buffers=buffers)
        buffers.drop_idle()
        listener = Listener(address)
        try:
            store.set(f"{prefix}/{rank}", listener.address)
            self._to_buddy: FramedStream = dial(store.get(f"{prefix}/{buddy}").decode(), MEET_S)
            self._from_protected_rank: FramedStream = listener.accept(MEET_S)
        finally:
            listener.close()
        self._orders: SimpleQueue[tuple[Snapshot, NamedRanges, Future[None], Future[None]] | None] = SimpleQueue()
        self._copied: Future[None] = _done()
        self._acknowledged: Future[None] = _done()
        self._waited_s = 0.0  # by the training thread, in total
        self._busy_s = [0.0, 0.0]  # processor time of the two threads, in total
        self._takes_cores = not pinned
        self._whole_every = whole_every
        self._since_whole = 0  # deltas since the newest whole snapshot
        self.begun = -2  # step of the newest snapshot begun; -1 for the state before the first step
        self.begun_bytes = 0  # of that snapshot, copied and sent

    def takes_delta(self, step: int) -> bool:
        """Whether the snapshot after `step` may be a delta."""
        return self.begun == step - 1 and self._since_whole < self._whole_every - 1

    @property
    def whole_bytes(self) -> int:
        """Bytes copied and sent for a whole snapshot: its work."""
        return self._own.copied_bytes(whole=True) + self._own.shared_bytes(whole=True)

    @property
    def mean_bytes(self) -> float:
        """Mean bytes copied and sent for a snapshot, if one follows each step."""
        deltas = (self._whole_every - 1) * self._delta_bytes
        return (self.whole_bytes + deltas) / self._whole_every

    @property
    def _delta_bytes(self) -> int:
        return self._own.copied_bytes(whole=False) + self._own.shared_bytes(whole=False)

    def start(self, vault: SnapshotStore) -> None:
        """Keep the generation's snapshots in `vault`, and start both threads."""
        vault.add(self._own)
        vault.add(self._kept)
        threading.Thread(target=self._send_all, name="snapshot", daemon=True).start()
        threading.Thread(target=self._receive_all, name="protected_rank", daemon=True).start()

    def begin(self, step: int, ranges: NamedRanges, note: str, update: Update | None = None) -> None:
        """Begin a snapshot of the shard after `step`. Returns at once; the shard must not change until `copied`.

        Args:
            ranges: of the shard; for a delta with the gradients of the update.
            update: from the step before to this one, for a delta.
        """
        self.copied()
        self._copied, self._acknowledged = Future(), Future()
        snapshot = self._own.begin(step, note, update)
        self._since_whole = 0 if update is None else self._since_whole + 1
        self.begun, self.begun_bytes = step, self.whole_bytes if update is None else self._delta_bytes
        self._orders.put((snapshot, ranges, self._copied, self._acknowledged))

    def copied(self) -> None:
        """Wait until the newest snapshot is copied: then the shard may change."""
        self._await(self._copied)

    def acknowledged(self) -> None:
        """Wait until the buddy has the newest snapshot. Raises StreamClosed if the connection has ended."""
        self._await(self._acknowledged)

    def cost_s(self) -> float:
        """Seconds that snapshots have cost training so far: its waits and, where training needs the same processors,
        the work of both threads."""
        return self._waited_s + (sum(self._busy_s) if self._takes_cores else 0.0)

    def _await(self, done: "Future[None]") -> None:
        if done.done():
            return done.result()
        began_s = time.perf_counter()
        try:
            done.result()
        finally:
            self._waited_s += time.perf_counter() - began_s

    def shut(self) -> None:
        """Shut both connections, also under threads that wait for them. Whole snapshots stay in the store."""
        self._to_buddy.shut()
        self._from_protected_rank.shut()

    def close(self) -> None:
        """End the protection of this generation."""
        self._orders.put(None)
        self.shut()

    def _send_all(self) -> None:
        closed: StreamClosed | None = None
        while (order := self._orders.get()) is not None:
            snapshot, ranges, copied, acknowledged = order
            try:
                copy_into(snapshot, ranges)
            except Exception as error:
                copied.set_exception(error)
                acknowledged.set_exception(error)
                continue
            del ranges, order  # nothing here may keep an old shard's memory
            self._own.finish(snapshot)
            copied.set_result(None)
            try:
                if closed is not None:
                    raise closed
                shared = self._own.shared(snapshot)
                self._to_buddy.send(_header(snapshot), shared)
                traffic_meter.enter(TrafficKind.PROTECTION, shared.nbytes)
                self._busy_s[0] = time.thread_time()
                acknowledged.set_result(None)
            except StreamClosed as error:
                closed = error
                acknowledged.set_exception(error)
        self._to_buddy.close()

    def _receive_all(self) -> None:
        arriving: list[Snapshot] = []

        def place(header: dict[str, Any], length: int) -> memoryview:
            update = None if header["update"] is None else Update(*header["update"])
            if header["generation"] != self.generation or length != self._kept.shared_bytes(whole=update is None):
                raise StreamClosed(f"unexpected snapshot: {length} bytes of generation {header['generation']}")
            arriving.append(self._kept.begin(int(header["step"]), str(header["note"]), update))
            return self._kept.shared(arriving[0])

        try:
            while True:
                self._from_protected_rank.receive(place)
                self._kept.finish(arriving.pop())
                self._from_protected_rank.acknowledge()
                self._busy_s[1] = time.thread_time()
        except StreamClosed as error:
            log.info("generation %d: no more snapshots from the protected rank: %s", self.generation, error)
        finally:
            for snapshot in arriving:
                self._kept.give_up(snapshot)
            self._from_protected_rank.close()


def _header(snapshot: Snapshot) -> dict[str, Any]:
    """Description of a snapshot for the buddy, sent with its bytes."""
    update = None if snapshot.update is None else astuple(snapshot.update)
    return {
        "step": snapshot.holding.step,
        "generation": snapshot.holding.generation,
        "note": snapshot.note,
        "update": update,
    }


def _done() -> "Future[None]":
    done: Future[None] = Future()
    done.set_result(None)
    return done
