"""One direction of protection: this rank's snapshots, copied and sent to the workers that keep them.

A thread beside the one that trains copies the shard (all that the training thread ever waits for before it changes the
state) and sends the shared part. Bytes go from memory to memory over a separate socket: they are neither pickled nor
pass through Ray.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import astuple, dataclass
from queue import SimpleQueue
from typing import Any

import torch

from orchestrator.comm import traffic_meter
from orchestrator.comm.transport.stream import FramedStream, StreamClosed
from orchestrator.protocol.codec import to_plain
from orchestrator.protocol.step_record import StepRecord
from orchestrator.protocol.usage import TrafficKind
from orchestrator.state.ranges import NamedRanges
from orchestrator.state.snapshot import Snapshot, Update, copy_into
from orchestrator.state.snapshot_store import RankSnapshots
from orchestrator.state.stream_copies import StreamCopies

NewRecords = Callable[[int], Sequence[StepRecord]]
CPU = torch.device("cpu")


def no_records(step: int) -> Sequence[StepRecord]:
    """For a buddy, which has the records of all steps itself."""
    return ()


class SnapshotSender:
    """Sends snapshots as they are begun.

    Args:
        own: this rank's snapshots.
        streams: to the workers that keep them.
        whole_every: one of so many snapshots is whole, the others are deltas.
        new_records: gives the records up to a step that were not sent yet; sent with its snapshot.
        device: of the shard.
    """

    def __init__(
        self,
        own: RankSnapshots,
        streams: Sequence[FramedStream],
        whole_every: int,
        new_records: NewRecords = no_records,
        device: torch.device = CPU,
    ) -> None:
        self._copies = StreamCopies(device)
        self.own, self._streams, self._new_records = own, streams, new_records
        self._orders: SimpleQueue[_Order | None] = SimpleQueue()
        self._copied: Future[None] = _done()
        self._acknowledged: Future[None] = _done()
        self._whole_every = whole_every
        self._since_whole = 0  # deltas since the newest whole snapshot
        self.waited_s = 0.0  # by the training thread, in total
        self.busy_s = 0.0  # processor time of this thread, in total
        self.begun = -2  # step of the newest snapshot begun; -1 for the state before the first step
        self.begun_bytes = 0  # of that snapshot, copied and sent

    def takes_delta(self, step: int) -> bool:
        """Whether the snapshot after `step` may be a delta."""
        return self.begun == step - 1 and self._since_whole < self._whole_every - 1

    @property
    def whole_bytes(self) -> int:
        """Bytes copied and sent for a whole snapshot: its work."""
        return self._bytes_of(whole=True)

    @property
    def mean_bytes(self) -> float:
        """Mean bytes copied and sent for a snapshot, if one follows each step."""
        deltas = (self._whole_every - 1) * self._bytes_of(whole=False)
        return (self.whole_bytes + deltas) / self._whole_every

    def _bytes_of(self, whole: bool) -> int:
        return self.own.copied_bytes(whole) + len(self._streams) * self.own.shared_bytes(whole)

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._send_all, name="snapshot", daemon=True).start()

    def begin(self, step: int, ranges: NamedRanges, note: str, update: Update | None = None) -> None:
        """Begin a snapshot of the shard after `step`. Returns at once; the shard must not change until `copied`.

        Args:
            ranges: of the shard; for a delta with the gradients of the update.
            update: from the step before to this one, for a delta.
        """
        self.copied()
        self._copied, self._acknowledged = Future(), Future()
        snapshot = self.own.begin(step, note, update)
        self._since_whole = 0 if update is None else self._since_whole + 1
        self.begun, self.begun_bytes = step, self._bytes_of(whole=update is None)
        self._orders.put(_Order(snapshot, ranges, self._copies.mark(), self._copied, self._acknowledged))

    def copied(self) -> None:
        """Wait until the newest snapshot is copied: then the shard may change."""
        self._await(self._copied)

    def acknowledged(self) -> None:
        """Wait until the newest snapshot is kept. Raises StreamClosed if the connection has ended."""
        self._await(self._acknowledged)

    def _await(self, done: "Future[None]") -> None:
        if done.done():
            return done.result()
        began_s = time.perf_counter()
        try:
            done.result()
        finally:
            self.waited_s += time.perf_counter() - began_s

    def shut(self) -> None:
        """Shut the connections, also under a thread that waits for one."""
        for stream in self._streams:
            stream.shut()

    def close(self) -> None:
        """End the thread and the connection."""
        self._orders.put(None)
        self.shut()

    def _send_all(self) -> None:
        closed: StreamClosed | None = None
        while (order := self._orders.get()) is not None:
            snapshot, copied, acknowledged = order.snapshot, order.copied, order.acknowledged
            try:
                with self._copies.after(order.mark):
                    copy_into(snapshot, order.ranges)
            except Exception as error:
                copied.set_exception(error)
                acknowledged.set_exception(error)
                continue
            del order  # nothing here may keep an old shard's memory
            self.own.finish(snapshot)
            copied.set_result(None)
            try:
                if closed is not None:
                    raise closed
                shared = self.own.shared(snapshot)
                header = _header(snapshot, self._new_records(snapshot.holding.step))
                for stream in self._streams:
                    stream.send(header, shared)
                    traffic_meter.enter(TrafficKind.PROTECTION, shared.nbytes)
                self.busy_s = time.thread_time()
                acknowledged.set_result(None)
            except StreamClosed as error:
                closed = error
                acknowledged.set_exception(error)
        for stream in self._streams:
            stream.close()


@dataclass(frozen=True)
class _Order:
    """A snapshot to be filled from these ranges, as they are at `mark`, and what is waited for."""

    snapshot: Snapshot
    ranges: NamedRanges
    mark: torch.cuda.Event | None
    copied: "Future[None]"
    acknowledged: "Future[None]"


def _header(snapshot: Snapshot, records: Sequence[StepRecord]) -> dict[str, Any]:
    """Description of a snapshot, sent with its bytes."""
    update = None if snapshot.update is None else astuple(snapshot.update)
    return {
        "step": snapshot.holding.step,
        "generation": snapshot.holding.generation,
        "note": snapshot.note,
        "update": update,
        "records": [to_plain(record) for record in records],
    }


def _done() -> "Future[None]":
    done: Future[None] = Future()
    done.set_result(None)
    return done
