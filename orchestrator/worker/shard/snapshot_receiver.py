"""One direction of protection: snapshots of another worker's rank, received and kept in this worker's memory."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from orchestrator.comm.transport.stream import FramedStream, StreamClosed
from orchestrator.protocol.codec import from_plain
from orchestrator.protocol.step_record import StepRecord
from orchestrator.state.snapshot import Snapshot, Update
from orchestrator.state.snapshot_store import RankSnapshots

log = logging.getLogger("orchestrator.worker")

KeepRecords = Callable[[Sequence[StepRecord]], None]


def drop(records: Sequence[StepRecord]) -> None:
    """For a buddy, which gets none."""


class SnapshotReceiver:
    """Receives snapshots of a protected rank until the connection ends.

    Args:
        kept: the protected rank's snapshots.
        stream: from the worker of that rank.
        keep_records: called with the records that came with a snapshot, before it is acknowledged.
    """

    def __init__(self, kept: RankSnapshots, stream: FramedStream, keep_records: KeepRecords = drop) -> None:
        self.kept, self._stream, self._keep_records = kept, stream, keep_records
        self._arriving: list[Snapshot] = []
        self.busy_s = 0.0  # processor time of the receiving thread, in total

    def start(self) -> None:
        """Receive in a thread of its own."""
        threading.Thread(target=self.receive_all, name="protected_rank", daemon=True).start()

    def receive_all(self) -> None:
        """Receive until the connection ends. Whole snapshots stay."""
        try:
            while True:
                header = self._stream.receive(self._place)
                self.kept.finish(self._arriving.pop())
                self._keep_records([from_plain(StepRecord, plain) for plain in header["records"]])
                self._stream.acknowledge()
                self.busy_s = time.thread_time()
        except StreamClosed as error:
            log.info("generation %d: no more snapshots from the protected rank: %s", self.kept.generation, error)
        finally:
            for snapshot in self._arriving:
                self.kept.give_up(snapshot)
            self._stream.close()

    def shut(self) -> None:
        """Shut the connection, also under a thread that waits for it."""
        self._stream.shut()

    def _place(self, header: dict[str, Any], length: int) -> memoryview:
        update = None if header["update"] is None else Update(*header["update"])
        if header["generation"] != self.kept.generation or length != self.kept.shared_bytes(whole=update is None):
            raise StreamClosed(f"unexpected snapshot: {length} bytes of generation {header['generation']}")
        snapshot = self.kept.begin(int(header["step"]), str(header["note"]), update)
        self._arriving.append(snapshot)
        return self.kept.shared(snapshot)
