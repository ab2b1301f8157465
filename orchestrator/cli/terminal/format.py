"""Texts of runs and rescales that several commands share. Pure functions."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from orchestrator.protocol.status import Recovery, Rescale, RunPhase, RunStatus
from orchestrator.protocol.usage import Traffic

NONE = "-"
SHOWN_METRICS = 2  # of a task, in a line
STAMPS = ("seq", "term", "time", "kind")  # of an event


def number(value: float | None, digits: int = 3) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def rate(per_second: float | None, unit: str = "tokens") -> str:
    return NONE if per_second is None else f"{per_second:,.0f} {unit}/s"


def size(num_bytes: int) -> str:
    if num_bytes < 1000:
        return f"{num_bytes} B"
    scaled, units = num_bytes / 1000, iter(("kB", "MB", "GB"))
    unit = next(units)
    for larger in units:
        if scaled >= 1000:
            scaled, unit = scaled / 1000, larger
    return f"{scaled:.1f} {unit}"


def traffic(kinds: Mapping[str, Traffic]) -> str:
    """Bytes that all workers send in a step, in sum and by kind; for compressed kinds also the raw bytes."""
    if not kinds:
        return NONE
    parts = []
    for kind, sent in kinds.items():
        made_of = f" of {size(sent.raw)}" if sent.raw != sent.sent else ""
        parts.append(f"{kind} {size(sent.sent)}{made_of}")
    return f"{size(sum(sent.sent for sent in kinds.values()))} per step: {', '.join(parts)}"


def moment(time_s: float | None) -> str:
    return NONE if time_s is None else datetime.fromtimestamp(time_s).strftime("%Y-%m-%d %H:%M:%S")


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def progress(status: RunStatus) -> str:
    """The run's progress as one line."""
    parts = [f"{status.run_id} {status.phase}", f"step {status.step}/{status.steps}"]
    if status.stage:
        parts.append(f"stage {status.stage}")
    if status.loss is not None:
        parts.append(f"loss {status.loss:.3f}")
    if status.validation_loss is not None:
        parts.append(f"val {status.validation_loss:.3f}")
    parts += [f"{name} {value:.3f}" for name, value in list(status.validation_metrics.items())[:SHOWN_METRICS]]
    if status.tokens_per_second is not None:
        parts.append(rate(status.tokens_per_second, status.unit))
    if status.workers_now:
        parts.append(workers(status))
    if status.phase in (RunPhase.QUEUED, RunPhase.STARTING, RunPhase.RECOVERING) and status.why:
        parts.append(status.why)
    return "  ".join(parts)


def workers(status: RunStatus) -> str:
    text = counted(status.workers_now, "worker")
    if status.workers_wanted not in (0, status.workers_now):
        text += f" (wanted {status.workers_wanted})"
    return text + (f" + {status.standbys} standby" if status.standbys else "")


def resources(amounts: Mapping[str, float]) -> str:
    """What a worker reserves, GPUs also where it has none: `resources.gpus: auto` depends on the nodes."""
    if not amounts:
        return NONE
    parts = [f"{amounts.get(kind, 0.0):g} {kind}{'s' * (amounts.get(kind) != 1.0)}" for kind in ("CPU", "GPU")]
    if amounts.get("memory"):
        parts.append(f"{size(int(amounts['memory']))} of memory")
    return ", ".join(parts)


def rescale(change: Rescale) -> str:
    """A rescale and its cost as one line. The step shown is the first of the new world."""
    what = f"{change.from_size} -> {change.to_size} workers"
    if change.experts is not None:
        before, after = change.experts
        what = f"{before} -> {after} experts per layer" if before != after else f"families of {after} experts dissolved"
        what += f" on {change.from_size} -> {change.to_size} workers" * (change.from_size != change.to_size)
    elif change.experts_moved:
        what = f"{counted(change.experts_moved, 'expert')} moved"
    return (
        f"{what} at step {change.step + 1}: {_stall(change)}, "
        f"{change.steps_lost} steps lost, {size(change.moved_bytes)} moved{_identical(change)} ({change.why})"
    )


def recovery(change: Recovery) -> str:
    """A recovery from failures and its cost as one line. The step shown is the first of the new world."""
    lost = ", ".join(change.lost) or "a connection"
    return (
        f"{lost} lost ({change.cause}): {change.from_size} -> {change.to_size} workers at step {change.step + 1} from "
        f"{change.source}: {_stall(change)}, {change.steps_lost} committed steps lost, "
        f"{change.steps_replayed} done again{_identical(change)}"
    )


def _stall(change: Rescale | Recovery) -> str:
    return "stall not measured yet" if change.stall_s is None else f"stall {change.stall_s:.2f} s"


def _identical(change: Rescale | Recovery) -> str:
    return {True: ", state identical", False: ", STATE DIFFERS", None: ""}[change.state_identical]


def event(fields: dict[str, Any]) -> str:
    """An event of the journal as one line: time, kind, and its other fields."""
    return f"{moment(fields['time'])}  {happening(fields, kind_width=18)}"


def happening(fields: Mapping[str, Any], kind_width: int = 0) -> str:
    """Kind and fields of an event, without its time."""
    shown = {key: value for key, value in fields.items() if key not in STAMPS and value is not None}
    pairs = "  ".join(f"{key}={_short(value)}" for key, value in shown.items())
    return f"{fields['kind']:<{kind_width}}  {pairs}".rstrip()


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return ",".join(map(_short, value)) if isinstance(value, list) else str(value)
