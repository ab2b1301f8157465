"""Snapshots in memory: `RankSnapshots` for each rank whose snapshots a worker holds, `SnapshotStore` for all of them.

Buffers are allocated when first needed and then reused. Those that a generation leaves free when it ends, and all of
them once it is settled, pass to the next generation (`orchestrator.state.buffers`). While a snapshot is written, the
two states before it, or at least one, stay: a complete state is never dropped for one that isn't complete yet.

    whole 4   delta 5   delta 6   delta 7   whole 8   delta 9     after 9 the newest states are 8 and 9, and 4 .. 7 go
"""

import threading
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from orchestrator.elastic.recovery_point import Holding
from orchestrator.elastic.snapshot_layout import SnapshotFormat
from orchestrator.elastic.state_layout import StateLayout
from orchestrator.state.buffers import Buffers
from orchestrator.state.snapshot import Replay, Snapshot, Update, views

KEPT = 2  # states: a worker one step ahead of the others may have to return to their step


@dataclass
class _Base:
    """A whole snapshot, and the deltas that follow it, one for each step."""

    whole: Snapshot
    deltas: list[Snapshot] = field(default_factory=list)

    @property
    def newest(self) -> int:
        return self.whole.holding.step + len(self.deltas)


class RankSnapshots:
    """Snapshots of one rank of one generation. From any thread.

    Args:
        layout: of the generation's state.
        shared_only: only the part that goes to a buddy is kept.
        whole_every: every so many snapshots one is whole, the others are deltas; 1: all are whole.
        replay: applies the updates of deltas.
        pinned: allocate buffers to which a GPU's memory is copied without a stop.
        buffers: source of other buffers.
    """

    def __init__(
        self,
        generation: int,
        rank: int,
        layout: StateLayout,
        shared_only: bool,
        whole_every: int = 1,
        replay: Replay | None = None,
        pinned: bool = False,
        buffers: Buffers | None = None,
    ) -> None:
        self.generation, self.rank, self.shared_only = generation, rank, shared_only
        self._whole_every, self._replay = whole_every, replay
        self._lock = threading.Lock()
        self._bases: list[_Base] = []
        self._buffers = buffers or Buffers()
        self._whole_format, self._delta_format = SnapshotFormat.of(layout, rank), SnapshotFormat.of_delta(layout, rank)
        num_deltas = whole_every if whole_every > 1 else 0  # all of a base, and the first one of the next
        # None: not allocated yet.
        self._free_whole: list[Tensor | None] = [self._pinned(self._whole_format) if pinned else None for _ in range(2)]
        self._free_deltas: list[Tensor | None] = [
            self._pinned(self._delta_format) if pinned else None for _ in range(num_deltas)
        ]

    def begin(self, step: int, note: str, update: Update | None = None) -> Snapshot:
        """A snapshot to be filled; `finish` adds it. The oldest whole one gives its memory if there are two.

        Args:
            update: from the step before to this one, for a delta. Its step follows the newest one here.

        Raises:
            ValueError: a delta of another step, or one more than there may be between two whole snapshots.
        """
        holding = Holding(self.generation, step, self.rank)
        with self._lock:
            if update is None:
                if not self._free_whole:
                    self._drop(self._bases[0])
                buffer, form = self._take(self._free_whole, self._whole_format), self._whole_format
            else:
                base = self._bases[-1] if self._bases else None
                if base is None or base.newest != step - 1 or len(base.deltas) >= self._whole_every - 1:
                    raise ValueError(f"a delta of step {step} doesn't follow {self._steps()}")
                buffer, form = self._take(self._free_deltas, self._delta_format), self._delta_format
        return Snapshot(holding, note, buffer, views(form, buffer, self.shared_only), update)

    def finish(self, snapshot: Snapshot) -> None:
        """Add a completed snapshot. States older than the newest two are dropped where that frees memory."""
        with self._lock:
            if snapshot.update is None:
                self._bases.append(_Base(snapshot))
            else:
                self._bases[-1].deltas.append(snapshot)
            oldest = min(self._steps())
            for base in [base for base in self._bases if base.newest < oldest]:
                self._drop(base)

    def give_up(self, snapshot: Snapshot) -> None:
        """Release the memory of a snapshot that won't be completed."""
        with self._lock:
            self._release(snapshot)

    def leave_free(self) -> None:
        """Release unused buffers for other uses. They are allocated again if they are needed later."""
        with self._lock:
            self._free_whole = [None] * len(self._free_whole)
            self._free_deltas = [None] * len(self._free_deltas)

    def shared(self, snapshot: Snapshot) -> memoryview:
        """The buddy's part, as bytes."""
        view: memoryview = snapshot.buffer[: self.shared_bytes(snapshot.update is None)].numpy().data
        return view

    def steps(self) -> tuple[int, ...]:
        """Steps after which the state is held here, ascending."""
        with self._lock:
            return self._steps()

    def state(self, step: int) -> Snapshot:
        """The whole state after a step; replayed if necessary. A replay needs the memory of a whole snapshot: the free
        one, or if there is none that of its base, from which nothing newer is made any more.

        Raises:
            KeyError: it isn't held here.
        """
        with self._lock:
            for base in self._bases:
                if base.whole.holding.step == step:
                    return base.whole
            for base in self._bases:
                if base.whole.holding.step < step <= base.newest:
                    return self._replayed(base, step)
            raise KeyError(f"step {step} of rank {self.rank} is not held here; held: {self._steps()}")

    def num_bytes(self) -> int:
        """Bytes of all buffers together, once all were needed."""
        of_delta = self._of(self._delta_format) * self._whole_every if self._whole_every > 1 else 0
        return 2 * self._of(self._whole_format) + of_delta

    def copied_bytes(self, whole: bool) -> int:
        """Bytes of a whole snapshot, or a delta, as stored here."""
        return self._of(self._whole_format if whole else self._delta_format)

    def shared_bytes(self, whole: bool) -> int:
        """Bytes sent to the buddy with a whole snapshot, or a delta."""
        return (self._whole_format if whole else self._delta_format).shared_bytes

    # -- with the lock -----------------------------------------------------------------------------------------

    def _steps(self) -> tuple[int, ...]:
        steps = {step for base in self._bases for step in range(base.whole.holding.step, base.newest + 1)}
        return tuple(sorted(steps)[-KEPT:])

    def _replayed(self, base: _Base, step: int) -> Snapshot:
        assert self._replay is not None
        deltas = base.deltas[: step - base.whole.holding.step]
        in_place = not self._free_whole
        buffer = base.whole.buffer if in_place else self._take(self._free_whole, self._whole_format)
        try:
            if not in_place:
                buffer.copy_(base.whole.buffer)
            ranges = views(self._whole_format, buffer, self.shared_only)
            self._replay(ranges, deltas)
        except BaseException:
            if in_place:  # it is partly of another step
                self._drop(base)
            else:
                self._free_whole.append(buffer)
            raise
        result = replace(deltas[-1], buffer=buffer, ranges=ranges, update=None)
        if in_place:
            self._bases.remove(base)
            for delta in base.deltas:
                self._release(delta)
        self._bases.append(_Base(result))
        self._bases.sort(key=lambda b: b.whole.holding.step)
        return result

    def _drop(self, base: _Base) -> None:
        self._bases.remove(base)
        for snapshot in (base.whole, *base.deltas):
            self._release(snapshot)

    def _release(self, snapshot: Snapshot) -> None:
        (self._free_whole if snapshot.update is None else self._free_deltas).append(snapshot.buffer)

    def _take(self, free: list[Tensor | None], form: SnapshotFormat) -> Tensor:
        """The buffer freed last. If there is no memory for a new one, the number of free ones is unchanged."""
        buffer = free[-1]
        if buffer is None:
            buffer = self._buffers.take(self._of(form))
        free.pop()
        return buffer

    def _pinned(self, form: SnapshotFormat) -> Tensor:
        """Allocated at once, since that takes long. torch itself caches it for the next `RankSnapshots`."""
        return torch.empty(self._of(form), dtype=torch.uint8, device="cpu", pin_memory=True)

    def _of(self, form: SnapshotFormat) -> int:
        return form.shared_bytes if self.shared_only else form.total_bytes


class SnapshotStore:
    """All snapshots in this process, by generation: its own rank's, and its protected ranks' or lone member's."""

    def __init__(self) -> None:
        self._held: tuple[RankSnapshots, ...] = ()
        self._distrusted: frozenset[tuple[int, int]] = frozenset()
        self._changing = threading.Lock()

    def add(self, snapshots: RankSnapshots) -> RankSnapshots:
        with self._changing:
            self._held = (*self._held, snapshots)
        return snapshots

    def remove(self, snapshots: RankSnapshots) -> None:
        """Drop these snapshots. From any thread."""
        with self._changing:
            self._held = tuple(other for other in self._held if other is not snapshots)

    def leave_free(self) -> None:
        """Leave buffers without a snapshot to the next generation, when one ends. From any thread."""
        for each in self._held:
            each.leave_free()

    def drop_before(self, generation: int) -> None:
        """Drop older generations. From any thread."""
        with self._changing:
            self._held = tuple(each for each in self._held if each.generation >= generation)

    def distrust(self, generation: int, step: int) -> None:
        """Treat a state that no longer matches its record as not held. From any thread."""
        with self._changing:
            self._distrusted |= {(generation, step)}

    def holdings(self) -> tuple[Holding, ...]:
        held = {Holding(each.generation, step, each.rank) for each in self._held for step in each.steps()}
        held = {holding for holding in held if (holding.generation, holding.step) not in self._distrusted}
        return tuple(sorted(held, key=lambda h: (h.generation, h.step, h.rank)))

    def find(self, holding: Holding) -> Snapshot:
        """The snapshot of `holding`. Raises KeyError if it isn't held."""
        for each in self._held if (holding.generation, holding.step) not in self._distrusted else ():
            if (each.generation, each.rank) == (holding.generation, holding.rank) and holding.step in each.steps():
                return each.state(holding.step)
        raise KeyError(f"{holding} is not held here; held: {self.holdings()}")

    def num_bytes(self) -> int:
        return sum(each.num_bytes() for each in self._held)
