"""What the live screen shows, as text: from statuses, events and step records. Pure."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from statistics import fmean, median
from typing import Any

from orchestrator.cli.terminal.format import (
    NONE,
    STAMPS,
    counted,
    duration,
    happening,
    number,
    rate,
    recovery,
    rescale,
    size,
)
from orchestrator.errors import ProtocolError
from orchestrator.protocol.codec import from_plain
from orchestrator.protocol.messages import StepRecord
from orchestrator.protocol.status import Recovery, Rescale, RunPhase, RunStatus, WorkerStatus

RECENT = 32  # steps that waits and the time to go are told from
SLOW = 1.2  # a member that computes so much longer than the others is named
WORTH_TELLING = 0.005  # of a step
SHORT_NODE = 8  # characters of a node's id
LONGEST_NAME = 24
EVENT_LEAST = 24  # columns that are worth a column of events
# What a line has room for. `orchestrator events` has everything.
TOLD = {
    "submitted": ("workers",),
    "generation_planned": ("generation", "members", "why"),
    "activated": ("generation", "members", "why"),
    "checkpoint": ("step",),
}

Event = Mapping[str, Any]


@dataclass(frozen=True)
class RunRow:
    """A run among others. Each field but `phase` is a cell of text."""

    run_id: str
    phase: RunPhase
    step: str
    loss: str
    speed: str
    workers: str
    stall: str
    event: str


@dataclass(frozen=True)
class Column:
    """Of the table of runs. `field` is that of `RunRow`."""

    header: str
    field: str
    width: int


@dataclass(frozen=True)
class RunView:
    """One run by itself.

    Args:
        done: share of its steps.
        figures: lines of them.
        loss, speed: by step, in order; speed in tokens per second. Steps whose loss isn't finite are left out.
        workers, traffic, events: a line each, events the newest first.
    """

    run_id: str
    phase: RunPhase
    step: str
    done: float
    figures: tuple[str, ...]
    loss: tuple[float, ...]
    speed: tuple[float, ...]
    workers: tuple[str, ...]
    traffic: tuple[str, ...]
    events: tuple[str, ...]


def in_order(statuses: Sequence[RunStatus]) -> tuple[RunStatus, ...]:
    """Runs that go on first, and of those that have ended the newest first."""
    going_on = [status for status in statuses if not status.phase.ended]
    over = [status for status in statuses if status.phase.ended]
    return (*going_on, *sorted(over, key=lambda status: status.ended_time or 0.0, reverse=True))


def row_of(status: RunStatus, newest: Event | None) -> RunRow:
    """Args: `newest` is the run's newest event."""
    return RunRow(
        run_id=status.run_id,
        phase=status.phase,
        step=f"{status.step}/{status.steps}",
        loss=number(status.loss),
        speed=NONE if status.tokens_per_second is None else f"{status.tokens_per_second:,.0f}",
        workers=_workers(status),
        stall=_stall(status),
        event=NONE if newest is None else event_line(newest),
    )


def columns(rows: Sequence[RunRow], width: int, gap: int) -> tuple[Column, ...]:
    """What fits into a table of this width, of which each column takes `gap` more than its own. Events get what the
    others leave, if that is something."""
    shown = (
        *(("RUN", "run_id"), ("PHASE", "phase"), ("STEP", "step"), ("LOSS", "loss"), ("TOKENS/S", "speed")),
        *(("WORKERS", "workers"), ("STALL", "stall")),
    )
    widest = [max(map(len, [header, *(str(getattr(row, field)) for row in rows)])) for header, field in shown]
    widest[0] = min(widest[0], LONGEST_NAME)
    widest[1] = max(map(len, RunPhase))  # the table shouldn't jump
    fixed = tuple(Column(header, field, wide) for (header, field), wide in zip(shown, widest, strict=True))
    left = width - sum(column.width + gap for column in fixed) - gap
    return (*fixed, Column("LAST EVENT", "event", left)) if left >= EVENT_LEAST else fixed


def remarks(status: RunStatus, newest: Event | None) -> tuple[str, ...]:
    """What a row has no room for: what the run waits for or how it ended, its newest event, what doesn't work."""
    told = [status.why or ("goes on" if not status.phase.ended else "")]
    told += [event_line(newest)] if newest is not None else []
    told += [f"warning: {status.warning}"] if status.warning else []
    return tuple(line for line in told if line)


def view_of(
    status: RunStatus, events: Sequence[Event], records: Sequence[StepRecord], goodput: float | None
) -> RunView:
    """Args: `events` and `records` in order, as far as they are known."""
    return RunView(
        run_id=status.run_id,
        phase=status.phase,
        step=f"{status.step}/{status.steps}",
        done=min(1.0, status.step / max(status.steps, 1)),
        figures=_figures(status, records, goodput),
        loss=tuple(record.loss for record in records if math.isfinite(record.loss)),
        speed=tuple(record.tokens / record.step_s for record in records if record.step_s > 0),
        workers=tuple(_worker(worker, status, records) for worker in status.worker_group) or (_nobody(status),),
        traffic=_traffic(status, records),
        events=tuple(event_line(event) for event in reversed(events)),
    )


def event_line(event: Event) -> str:
    """The time of day, and what happened."""
    return f"{datetime.fromtimestamp(event['time']).strftime('%H:%M:%S')}  {_words(event)}"


def _words(event: Event) -> str:
    kind = event["kind"]
    plain = {key: value for key, value in event.items() if key not in STAMPS}
    with suppress(ProtocolError):  # another version's
        if kind == "rescaled":
            return f"{kind}  {rescale(from_plain(Rescale, plain))}"
        if kind == "recovered":
            return f"{kind}  {recovery(from_plain(Recovery, plain))}"
    told = TOLD.get(kind, tuple(plain))
    return happening({"kind": kind, **{key: plain[key] for key in told if key in plain}})


def _workers(status: RunStatus) -> str:
    if status.phase.ended:
        return NONE
    wanted = f"/{status.workers_wanted}" if status.workers_wanted != status.workers_now else ""
    return f"{status.workers_now}{wanted}" + (f" +{status.standbys}" if status.standbys else "")


def _stall(status: RunStatus) -> str:
    """Of the newest rescale or recovery."""
    changes: list[Rescale | Recovery] = [*status.rescales, *status.recoveries]
    if not changes:
        return NONE
    stall_s = max(changes, key=lambda change: change.generation).stall_s
    return "…" if stall_s is None else f"{stall_s:.2f} s"


def _figures(status: RunStatus, records: Sequence[StepRecord], goodput: float | None) -> tuple[str, ...]:
    parts = [f"loss {number(status.loss)}"]
    if status.validation_loss is not None:
        parts.append(f"validation {number(status.validation_loss)}")
    parts.append(rate(status.tokens_per_second))
    if goodput is not None:
        parts.append(f"goodput {goodput:.1%}")
    if records and not status.phase.ended:
        left_s = (status.steps - status.step) * median(record.step_s for record in records[-RECENT:])
        parts.append(f"{duration(left_s)} to go")
    world = [_world(status)]
    if status.priority:
        world.append(f"priority {status.priority}")
    if status.stage:
        world.append(f"stage {status.stage}")
    world.append(f"checkpoint of step {status.checkpoint_step}" if status.checkpoint else "no checkpoint yet")
    world.append(f"last stall {_stall(status)}")
    lines = ["  ".join(parts), "  ".join(world)]
    lines += [note for note in (status.error or status.why,) if note]
    return (*lines, f"warning: {status.warning}") if status.warning else tuple(lines)


def _world(status: RunStatus) -> str:
    if status.phase.ended:
        return "no workers"
    wanted = "" if status.workers_wanted == status.workers_now else f" of {status.workers_wanted} wanted"
    return f"{counted(status.workers_now, 'worker')}{wanted}, {counted(status.standbys, 'standby')}"


def _worker(worker: WorkerStatus, status: RunStatus, records: Sequence[StepRecord]) -> str:
    place = "-" if worker.rank is None else f"rank {worker.rank}"
    text = f"{worker.worker:<5}{place:<9}{worker.phase:<10}"
    if len({each.node for each in status.worker_group}) > 1:
        text += f"node {worker.node[:SHORT_NODE] or '?'}  "
    newest = records[-1] if records else None
    if newest is not None and worker.rank == newest.slowest and newest.slowness >= SLOW:
        text += f"{newest.slowness:.1f} x slower"
    return text.rstrip()


def _nobody(status: RunStatus) -> str:
    return "nobody: the run has ended" if status.phase.ended else "nobody yet"


def _traffic(status: RunStatus, records: Sequence[StepRecord]) -> tuple[str, ...]:
    """How long a step takes and what it waits for, over the newest steps; what workers send in it."""
    recent = records[-RECENT:]
    if not recent:
        return ("no step yet",)
    step_s = fmean(record.step_s for record in recent)
    peers = [record.communication_wait_s for record in recent if record.communication_wait_s is not None]
    waits = {"peers": fmean(peers) if peers else None}
    waits["rows"] = fmean(record.data_wait_s for record in recent)
    waits["buddies"] = fmean(record.protection_wait_s for record in recent)
    shares = {what: wait / step_s for what, wait in waits.items() if wait is not None and step_s > 0}
    told = [f"{what} {share:.0%}" for what, share in shares.items() if share >= WORTH_TELLING]
    interval = recent[-1].snapshot_interval
    snapshots = {0: "none", 1: "each step"}.get(interval, f"each {interval} steps")
    sent = status.traffic.values()
    lines = [
        ("a step", f"{step_s:.3f} s"),
        ("waits for", ", ".join(told) or "next to nothing"),
        ("snapshots", snapshots),
        ("compression", recent[-1].compression or NONE),
        ("sent", f"{size(sum(each.sent for each in sent))} a step" if sent else "nothing: one worker"),
    ]
    for kind, each in status.traffic.items():
        lines.append((f"  {kind}", size(each.sent) + (f" of {size(each.raw)}" if each.raw != each.sent else "")))
    return tuple(f"{heading:<13}{value}" for heading, value in lines)
