"""Protection of a member in one generation: sends its snapshots, and receives those of the ranks that it protects.

In a world of several, each rank's snapshots go to a *buddy*, another rank, and with two copies to a second one. In
a world of one they go to a *keeper*, a standby, once one has connected, and no rank is protected in return.
"""

from collections.abc import Callable, Sequence

from torch._C._distributed_c10d import Store

from orchestrator.comm.transport.stream import FramedStream, Listener, StreamClosed, dial
from orchestrator.protocol.messages import GenerationPlan
from orchestrator.state.snapshot_store import SnapshotStore
from orchestrator.worker.shard.snapshot_receiver import SnapshotReceiver
from orchestrator.worker.shard.snapshot_sender import SnapshotSender

MEET_S = 60.0  # how long to wait for a peer
ANSWER_S = 5.0  # after which a keeper that takes no part of a snapshot, or doesn't acknowledge it, is lost
LOOK_S = 0.5  # how often a keeper that waits for its member looks whether it is still one


class SnapshotReplicator:
    """Both directions of one member's protection.

    Args:
        sender: of its own snapshots.
        receivers: of its protected ranks'; none in a world of one.
        takes_cores: training needs the same processors as the threads of both.
    """

    def __init__(self, sender: SnapshotSender, receivers: Sequence[SnapshotReceiver], takes_cores: bool) -> None:
        self.sender, self._receivers, self._takes_cores = sender, receivers, takes_cores
        self.generation = sender.own.generation

    def start(self, store: SnapshotStore) -> None:
        """Keep the generation's snapshots in `store`, and start the threads."""
        store.add(self.sender.own)
        self.sender.start()
        for receiver in self._receivers:
            store.add(receiver.kept)
            receiver.start()

    @property
    def first_bytes(self) -> int:
        """Bytes of the first snapshots, which are whole."""
        kept = sum(receiver.kept.shared_bytes(whole=True) for receiver in self._receivers)
        return self.sender.own.copied_bytes(whole=True) + kept

    def cost_s(self) -> float:
        """Seconds that snapshots have cost training so far: its waits and, where training needs the same processors,
        the work of the threads."""
        busy_s = self.sender.busy_s + sum(receiver.busy_s for receiver in self._receivers)
        return self.sender.waited_s + (busy_s if self._takes_cores else 0.0)

    def shut(self) -> None:
        """Shut all connections, also under threads that wait for them. Whole snapshots stay in the store."""
        self.sender.shut()
        for receiver in self._receivers:
            receiver.shut()

    def close(self) -> None:
        """End the protection of this generation."""
        self.sender.close()
        self.shut()


def meet_buddies(
    store: Store, plan: GenerationPlan, rank: int, address: str
) -> list[tuple[FramedStream, FramedStream]]:
    """Connections to each of a rank's buddies, and from the rank that it protects in the same ring. Collective over the
    generation's members.

    Args:
        address: where this worker can be reached.

    Raises:
        StreamClosed: a buddy or protected rank did not connect.
    """
    met: list[tuple[FramedStream, FramedStream]] = []
    try:
        for number, ring in enumerate(plan.rings):
            met.append(_meet_in_ring(store, f"{plan.store_prefix}/protection/{number}", ring, rank, address))
    except BaseException:
        for stream in (stream for pair in met for stream in pair):
            stream.close()
        raise
    return met


def _meet_in_ring(
    store: Store, prefix: str, ring: Sequence[int], rank: int, address: str
) -> tuple[FramedStream, FramedStream]:
    listener = Listener(address)
    try:
        store.set(f"{prefix}/{rank}", listener.address)
        to_buddy = dial(store.get(f"{prefix}/{ring[rank]}").decode(), MEET_S)
        return to_buddy, listener.accept(MEET_S)
    finally:
        listener.close()


def meet_keeper(store: Store, prefix: str) -> FramedStream:
    """A lone member's connection to its keeper. Raises StreamClosed if it can't be reached, RuntimeError if it doesn't
    publish its address or the store fails."""
    return dial(store.get(f"{prefix}/address").decode(), MEET_S, ANSWER_S)


def meet_member(store: Store, prefix: str, address: str, is_wanted: Callable[[], bool]) -> FramedStream:
    """A keeper's connection from the lone member.

    Args:
        is_wanted: whether to go on waiting for it.

    Raises:
        StreamClosed: it did not connect.
    """
    listener = Listener(address)
    try:
        store.set(f"{prefix}/address", listener.address)
        for _ in range(int(MEET_S / LOOK_S)):
            try:
                return listener.accept(LOOK_S)
            except StreamClosed:
                if not is_wanted():
                    break
        raise StreamClosed("the member did not connect")
    finally:
        listener.close()
