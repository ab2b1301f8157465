"""Checkpoints that a run's journal names: what is complete, which is the newest, and which were given up. Pure.

A checkpoint is complete once the journal has its `CheckpointCommitted`. Whatever else lies in run storage is garbage,
or will be complete.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Self

from orchestrator.policy.state.run_state import StateDecided
from orchestrator.protocol.events.base import Event
from orchestrator.protocol.events.generations import RolledBack
from orchestrator.protocol.events.run import Resumed, Suspended
from orchestrator.protocol.events.training import CheckpointCommitted, CheckpointsAbandoned, CheckpointsDeleted


@dataclass(frozen=True)
class CheckpointRecord:
    """A complete checkpoint.

    Args:
        generation: that wrote it.
        name: of its directory.
        sha256: of its manifest's file.
    """

    step: int
    generation: int
    name: str
    sha256: str


@dataclass(frozen=True)
class CheckpointRecords:
    """All checkpoints that the journal names, up to one of its events. The order in which concurrent commits and a
    return to an earlier step are journalled doesn't matter.

    Args:
        current: those that the run may be restored from, oldest first: steps grow, and generations with them.
        set_aside: those of steps that the run went back behind. They may have been deleted, on a full disk.
        first_generation: those of earlier generations count only up to `back_to`, a step that the run went back to.
        is_going_back: to the checkpoint of the next state.
        abandoned: names of those that may not be completed any more, since their parts are deleted.
    """

    current: tuple[CheckpointRecord, ...] = ()
    set_aside: tuple[CheckpointRecord, ...] = ()
    first_generation: int = 0
    back_to: int = -1
    is_going_back: bool = False
    abandoned: tuple[str, ...] = ()

    @property
    def newest(self) -> tuple[int, int]:
        """(generation, step) of the newest one; (-1, -1) without any."""
        return (self.current[-1].generation, self.current[-1].step) if self.current else (-1, -1)

    @property
    def names(self) -> frozenset[str]:
        """Of the directories of all of them."""
        return frozenset(record.name for record in (*self.current, *self.set_aside))

    def of(self, step: int) -> CheckpointRecord | None:
        """The current one of this step."""
        return next((record for record in self.current if record.step == step), None)

    def is_left_behind(self, generation: int, step: int) -> bool:
        """Whether the run has gone back behind this step of a generation."""
        return generation < self.first_generation and step > self.back_to

    def after(self, event: Event) -> Self:
        """The records after the journal's next event."""
        match event:
            case CheckpointCommitted(step, path, generation, sha256):
                return self._with(CheckpointRecord(step, generation, PurePath(path).name, sha256))
            case CheckpointsDeleted(steps):
                return replace(self, current=tuple(record for record in self.current if record.step not in steps))
            case CheckpointsAbandoned(names):
                fresh = sorted({*self.abandoned, *names} - self.names)
                return replace(self, abandoned=tuple(fresh))
            case RolledBack() | Suspended() | Resumed():
                return replace(self, is_going_back=True)
            case StateDecided(state) if self.is_going_back:
                back = replace(self, first_generation=state.checkpoint_generation + 1, back_to=state.checkpoint_done)
                return replace(back._sorted(self.current), is_going_back=False)
        return self

    def _with(self, record: CheckpointRecord) -> Self:
        """The checkpoints with this one added; it replaces that of the same step if its generation is later."""
        if record in self.set_aside or record.name in self.abandoned:
            return self
        others = [other for other in self.current if other.step != record.step]
        same = [other for other in self.current if other.step == record.step]
        return self._sorted([*others, max(*same, record, key=lambda one: one.generation) if same else record])

    def _sorted(self, records: Iterable[CheckpointRecord]) -> Self:
        """These records as the current ones, without those that were given up: a later generation has continued from a
        step before theirs."""
        current: list[CheckpointRecord] = []
        given_up: list[CheckpointRecord] = []
        for record in sorted(records, key=lambda one: (one.generation, one.step), reverse=True):
            passed = current and current[-1].step < record.step
            is_over = passed or self.is_left_behind(record.generation, record.step)
            (given_up if is_over else current).append(record)
        aside = sorted({*self.set_aside, *given_up}, key=lambda one: (one.generation, one.step))
        return replace(self, current=tuple(reversed(current)), set_aside=tuple(aside))
