"""Connection between the member of a world of one and its keeper, made in the background at either end."""

import logging
import threading
import weakref
from collections.abc import Sequence
from itertools import takewhile

from torch._C._distributed_c10d import Store

from orchestrator.comm.transport.rendezvous import connect_store
from orchestrator.protocol.messages import Directive, GenerationPlan, Keeper
from orchestrator.protocol.step_record import StepRecord
from orchestrator.state.snapshot_store import RankSnapshots
from orchestrator.worker.runtime.mailbox import WorkerMailbox
from orchestrator.worker.shard.shard import ShardFactory
from orchestrator.worker.shard.snapshot_receiver import SnapshotReceiver
from orchestrator.worker.shard.snapshot_replicator import SnapshotReplicator
from orchestrator.worker.transition.snapshots import SnapshotManager

log = logging.getLogger("orchestrator.worker")


class KeeperLink:
    """Follows the keepers that directives name, in threads of its own.

    As a keeper this worker receives snapshots until the connection ends or the generation is aborted, and holds them
    until the directive names it no longer. As the member it offers the connection to the training thread, and shuts it
    once the directive names the keeper no longer.
    """

    def __init__(self, factory: ShardFactory, mailbox: WorkerMailbox, snapshots: SnapshotManager) -> None:
        self._factory, self._mailbox, self._snapshots = factory, mailbox, snapshots
        self._lock = threading.Lock()
        self._begun = -1  # number of the newest keeper that this worker has begun to connect for
        self._ready: tuple[Keeper, SnapshotReplicator] | None = None
        self._used: tuple[Keeper, weakref.ref[SnapshotReplicator]] | None = None  # the one that was last taken
        self._receiving: dict[Keeper, SnapshotReceiver] = {}
        self._kept: dict[Keeper, RankSnapshots] = {}  # also of connections that have ended
        self._closed = False
        threading.Thread(target=self._watch, name="keeper_link", daemon=True).start()

    def take(self, generation: int) -> tuple[Keeper, SnapshotReplicator] | None:
        """The connection to a keeper of this generation that has been made since the last call. Never waits."""
        with self._lock:
            ready, self._ready = self._ready, None
            is_of_it = ready is not None and ready[0].generation == generation
            if ready is not None and is_of_it:
                self._used = ready[0], weakref.ref(ready[1])
        if ready is not None and not is_of_it:
            ready[1].close()
            return None
        return ready

    def close(self) -> None:
        """Follow no more keepers, and end the connections that training doesn't use."""
        with self._lock:
            self._closed = True
            ready, self._ready = self._ready, None
            receiving, self._receiving = self._receiving, {}
        if ready is not None:
            ready[1].close()
        for receiver in receiving.values():
            receiver.shut()
        self._mailbox.publish()  # wakes the watcher

    def _watch(self) -> None:
        while not self._closed:
            directive = self._mailbox.wait(lambda d: self._closed or self._next(d) is not None or self._has_over(d))
            self._end_protection(directive)
            self._end_aborted(directive)
            self._free(directive)
            keeper, plan = self._next(directive), directive.current
            if not self._closed and keeper is not None and plan is not None:
                self._begun = keeper.number
                threading.Thread(target=self._connect, args=(keeper, plan), name="keeper", daemon=True).start()

    def _next(self, directive: Directive) -> Keeper | None:
        """The keeper to connect for: the newest one, if it or its member is this worker."""
        keeper, plan = next(reversed(directive.keepers), None), directive.current
        if keeper is None or plan is None or keeper.generation != plan.generation or keeper.number <= self._begun:
            return None
        return keeper if self._factory.me in (keeper.worker, *plan.world.members) else None

    def _connect(self, keeper: Keeper, plan: GenerationPlan) -> None:
        try:
            store = connect_store(keeper.store_address.host, keeper.store_address.port)
            if keeper.worker == self._factory.me:
                self._keep(store, keeper, plan)
            else:
                self._offer(store, keeper, plan)
        except Exception as error:  # of any kind: the controller waits for a report
            log.warning("keeper %d is not connected: %s", keeper.number, error)
            self._mailbox.publish(unkept=keeper.number)

    def _offer(self, store: Store, keeper: Keeper, plan: GenerationPlan) -> None:
        """Connect to the keeper, for the training thread."""
        connected = self._factory.protect_alone(store, plan, keeper, _NewRecords(self._mailbox, keeper.after_step))
        with self._lock:
            unused = self._ready[1] if self._ready is not None else None
            if self._closed:
                unused = connected
            else:
                self._ready = (keeper, connected)
        if unused is not None:
            unused.close()
        self._mailbox.publish()  # the watcher looks whether it is still wanted

    def _end_protection(self, directive: Directive) -> None:
        """End the member's connection to a keeper that is gone. The training thread may wait for its answer."""
        with self._lock:
            offered = self._ready if self._ready is not None and _is_gone(self._ready[0], directive) else None
            used = self._used if self._used is not None and _is_gone(self._used[0], directive) else None
            self._ready = self._ready if offered is None else None
            self._used = self._used if used is None else None
        if offered is not None:
            offered[1].close()
        if used is not None and (protection := used[1]()) is not None:
            protection.shut()

    # -- as a keeper -------------------------------------------------------------------------------------------

    def _keep(self, store: Store, keeper: Keeper, plan: GenerationPlan) -> None:
        """Receive snapshots until the connection ends, then report what is held."""

        def is_wanted() -> bool:
            directive = self._mailbox.directive
            return not self._closed and directive.aborted < keeper.generation and keeper in directive.keepers

        receiver = self._factory.keep(store, plan, keeper, is_wanted, self._mailbox.keep)
        log.info("keeper %d keeps the snapshots of generation %d", keeper.number, keeper.generation)
        self._snapshots.keep(receiver.kept)
        with self._lock:
            self._receiving[keeper], self._kept[keeper] = receiver, receiver.kept
        self._mailbox.publish()  # the watcher looks whether it is still wanted
        try:
            receiver.receive_all()
        finally:
            self._mailbox.publish(unkept=keeper.number, holdings=self._snapshots.holdings)

    def _end_aborted(self, directive: Directive) -> None:
        """Receive no more from a member whose generation is aborted: it may be unreachable."""
        with self._lock:
            ended = [self._receiving.pop(keeper) for keeper in list(self._receiving) if _is_aborted(keeper, directive)]
        for receiver in ended:
            receiver.shut()

    def _free(self, directive: Directive) -> None:
        """Drop the snapshots of keepers that are needed no longer."""
        with self._lock:
            over = [keeper for keeper in self._kept if _is_over(keeper, directive)]
            receivers = [self._receiving.pop(keeper) for keeper in over if keeper in self._receiving]
            kept = [self._kept.pop(keeper) for keeper in over]
        for receiver in receivers:
            receiver.shut()
        for snapshots in kept:
            self._snapshots.drop(snapshots)
        if kept:
            self._mailbox.publish(holdings=self._snapshots.holdings)

    def _has_over(self, directive: Directive) -> bool:
        with self._lock:
            is_aborted = any(_is_aborted(keeper, directive) for keeper in self._receiving)
            is_gone = any(_is_gone(each[0], directive) for each in (self._ready, self._used) if each is not None)
            return is_aborted or is_gone or any(_is_over(keeper, directive) for keeper in self._kept)


def _is_aborted(keeper: Keeper, directive: Directive) -> bool:
    return directive.aborted >= keeper.generation


def _is_gone(keeper: Keeper, directive: Directive) -> bool:
    return keeper not in directive.keepers or _is_aborted(keeper, directive)


def _is_over(keeper: Keeper, directive: Directive) -> bool:
    """Whether nothing may be restored from what this keeper has: another one has newer snapshots of the same world, or
    the run won't return to it."""
    if keeper in directive.keepers:
        return False
    current = directive.current
    if current is None or directive.settled > keeper.generation:
        return True
    return current.generation == keeper.generation and not _is_aborted(keeper, directive)


class _NewRecords:
    """Gives the member's records, each once.

    Args:
        after_step: the first one is of the step after this one.
    """

    def __init__(self, mailbox: WorkerMailbox, after_step: int) -> None:
        self._mailbox, self._newest = mailbox, after_step

    def __call__(self, step: int) -> Sequence[StepRecord]:
        newest_first = takewhile(lambda record: record.step > self._newest, reversed(self._mailbox.records))
        fresh = [record for record in newest_first if record.step <= step][::-1]
        self._newest = max(self._newest, step)
        return fresh
