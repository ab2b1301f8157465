"""Texts of the live screen, from statuses, events and step records. Pure functions."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from statistics import fmean, median
from typing import Any

from orchestrator.cli.terminal.format import (
    NONE,
    SHOWN_METRICS,
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
from orchestrator.protocol.status import Recovery, Rescale, RunPhase, RunStatus, WorkerStatus
from orchestrator.protocol.step_record import StepRecord

RECENT = 32  # steps from which waits and the time to go are estimated
SLOW = 1.2  # a member that computes this many times as long as the others is named
WORTH_TELLING = 0.005  # waits of a smaller share of a step are left out
SHORT_NODE = 8  # characters of a node's id
LONGEST_NAME = 24
EVENT_LEAST = 24  # the least width of a column of events
# Fields for which a line has room. `orchestrator events` shows all.
TOLD = {
    "submitted": ("workers",),
    "generation_planned": ("generation", "members", "why"),
    "activated": ("generation", "members", "why"),
    "checkpoint": ("step",),
}

Event = Mapping[str, Any]


@dataclass(frozen=True)
class RunRow:
    """A row of the table of runs. Each field but `phase` is a cell of text."""

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
    """A column of the table of runs. `field` is that of `RunRow`."""

    header: str
    field: str
    width: int


@dataclass(frozen=True)
class RunView:
    """The view of one run.

    Args:
        done: share of its steps.
        figures: as lines of text.
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
    """Active runs first, then ended ones, the newest first."""
    going_on = [status for status in statuses if not status.phase.ended]
    over = [status for status in statuses if status.phase.ended]
    return (*going_on, *sorted(over, key=lambda status: status.ended_time or 0.0, reverse=True))


def row_of(status: RunStatus, newest: Event | None) -> RunRow:
    """The row of a run. `newest` is its newest event."""
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
    """The columns that fit into a table of this width, where each takes `gap` more than its own. Events get what the
    others leave, if that is at least EVENT_LEAST."""
    shown = (
        *(("RUN", "run_id"), ("PHASE", "phase"), ("STEP", "step"), ("LOSS", "loss"), ("TOKENS/S", "speed")),
        *(("WORKERS", "workers"), ("STALL", "stall")),
    )
    widest = [max(map(len, [header, *(str(getattr(row, field)) for row in rows)])) for header, field in shown]
    widest[0] = min(widest[0], LONGEST_NAME)
    widest[1] = max(map(len, RunPhase))  # constant, so that the table doesn't jump
    fixed = tuple(Column(header, field, wide) for (header, field), wide in zip(shown, widest, strict=True))
    left = width - sum(column.width + gap for column in fixed) - gap
    return (*fixed, Column("LAST EVENT", "event", left)) if left >= EVENT_LEAST else fixed


def remarks(status: RunStatus, newest: Event | None) -> tuple[str, ...]:
    """Texts for which a row has no room: the run's state or end, its newest event, its warning."""
    lines = [status.why or ("active" if not status.phase.ended else "")]
    lines += [event_line(newest)] if newest is not None else []
    lines += [f"warning: {status.warning}"] if status.warning else []
    return tuple(line for line in lines if line)


def view_of(
    status: RunStatus, events: Sequence[Event], records: Sequence[StepRecord], goodput: float | None
) -> RunView:
    """The view of a run. `events` and `records` are in order, as far as they are known."""
    return RunView(
        run_id=status.run_id,
        phase=status.phase,
        step=f"{status.step}/{status.steps}",
        done=min(1.0, status.step / max(status.steps, 1)),
        figures=_figures(status, records, goodput),
        loss=tuple(record.loss for record in records if math.isfinite(record.loss)),
        speed=tuple(record.batch.tokens / record.timing.step_s for record in records if record.timing.step_s > 0),
        workers=tuple(_worker(worker, status, records) for worker in status.worker_group) or (_nobody(status),),
        traffic=_traffic(status, records),
        events=tuple(event_line(event) for event in reversed(events)),
    )


def no_steps(status: RunStatus) -> str:
    """Text in place of figures of steps, without their records: they are read after the first screen."""
    return "no step yet" if status.step == 0 else "no step read yet"


def event_line(event: Event) -> str:
    """The time of day, and what happened."""
    return f"{datetime.fromtimestamp(event['time']).strftime('%H:%M:%S')}  {_words(event)}"


def _words(event: Event) -> str:
    kind = event["kind"]
    plain = {key: value for key, value in event.items() if key not in STAMPS}
    with suppress(ProtocolError):  # written by another version
        if kind == "rescaled":
            return f"{kind}  {rescale(from_plain(Rescale, plain))}"
        if kind == "recovered":
            return f"{kind}  {recovery(from_plain(Recovery, plain))}"
    shown = TOLD.get(kind, tuple(plain))
    return happening({"kind": kind, **{key: plain[key] for key in shown if key in plain}})


def _workers(status: RunStatus) -> str:
    if status.phase.ended:
        return NONE
    wanted = f"/{status.workers_wanted}" if status.workers_wanted != status.workers_now else ""
    return f"{status.workers_now}{wanted}" + (f" +{status.standbys}" if status.standbys else "")


def _stall(status: RunStatus) -> str:
    """The stall of the newest rescale or recovery."""
    changes: list[Rescale | Recovery] = [*status.rescales, *status.recoveries]
    if not changes:
        return NONE
    stall_s = max(changes, key=lambda change: change.generation).stall_s
    return "…" if stall_s is None else f"{stall_s:.2f} s"


def _figures(status: RunStatus, records: Sequence[StepRecord], goodput: float | None) -> tuple[str, ...]:
    parts = [f"loss {number(status.loss)}"]
    if status.validation_loss is not None:
        parts.append(f"validation {number(status.validation_loss)}")
    parts += [f"{name} {number(value)}" for name, value in list(status.validation_metrics.items())[:SHOWN_METRICS]]
    parts.append(rate(status.tokens_per_second, status.unit))
    if goodput is not None:
        parts.append(f"goodput {goodput:.1%}")
    if records and not status.phase.ended:
        left_s = (status.steps - status.step) * median(record.timing.step_s for record in records[-RECENT:])
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
    if newest is not None and worker.rank == newest.timing.slowest and newest.timing.slowness >= SLOW:
        text += f"{newest.timing.slowness:.1f} x slower"
    return text.rstrip()


def _nobody(status: RunStatus) -> str:
    return "none: the run has ended" if status.phase.ended else "none yet"


def _traffic(status: RunStatus, records: Sequence[StepRecord]) -> tuple[str, ...]:
    """Duration and waits of a step, over the newest steps, and the bytes that workers send in it."""
    recent = records[-RECENT:]
    if not recent:
        return (no_steps(status),)
    step_s = fmean(record.timing.step_s for record in recent)
    peers = [record.timing.communication_wait_s for record in recent if record.timing.communication_wait_s is not None]
    waits = {"peers": fmean(peers) if peers else None}
    waits["rows"] = fmean(record.timing.data_wait_s for record in recent)
    waits["buddies"] = fmean(record.timing.protection_wait_s for record in recent)
    shares = {what: wait / step_s for what, wait in waits.items() if wait is not None and step_s > 0}
    named = [f"{what} {share:.0%}" for what, share in shares.items() if share >= WORTH_TELLING]
    interval = recent[-1].state.snapshot_interval
    snapshots = {0: "none", 1: "each step"}.get(interval, f"each {interval} steps")
    sent = status.traffic.values()
    lines = [
        ("a step", f"{step_s:.3f} s"),
        ("waits for", ", ".join(named) or "almost nothing"),
        ("snapshots", snapshots),
        ("compression", recent[-1].communication.compression or NONE),
        ("sent", f"{size(sum(each.sent for each in sent))} a step" if sent else "nothing: one worker"),
    ]
    for kind, each in status.traffic.items():
        lines.append((f"  {kind}", size(each.sent) + (f" of {size(each.raw)}" if each.raw != each.sent else "")))
    return tuple(f"{heading:<13}{value}" for heading, value in lines)
