"""Tables of a run's report, shared by the terminal and the HTML page. Pure functions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from orchestrator.cli.terminal.format import NONE, counted, duration, number, rate
from orchestrator.policy.report.energy import EnergyMethod
from orchestrator.policy.report.goodput import MEANINGS, TransitionTime, Use
from orchestrator.policy.report.report import RunReport
from orchestrator.policy.report.worker_hours import RECONCILES

NOT_MEASURED = "not measured"

Row = tuple[str, Callable[[RunReport], str]]  # heading, and the cell for a report


@dataclass(frozen=True)
class Table:
    """A table of text. `notes` explain it."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def tables(reports: Sequence[RunReport]) -> tuple[Table, ...]:
    """Tables with one column per run, and a table of each run's transitions."""
    names = tuple(report.run_id for report in reports)
    return (
        _table(("RUN", *names), reports, _RUN),
        _time(reports),
        _table(("WORKERS", *names), reports, _WORKERS, (_HOURS,)),
        _table(("ENERGY, COST, WORK", *names), reports, _energy(reports) + _COSTS, (*_energy_notes(reports), _FLOPS)),
        *(_transitions(report) for report in reports if report.transitions),
    )


def warnings(report: RunReport) -> list[str]:
    """Warnings to be read before the figures."""
    lines = []
    if not report.outcome:
        lines.append(f"{report.run_id} has not ended according to its journal: all figures are up to its newest entry.")
    if not report.workers.reconciles:
        lines.append(
            f"Worker-hours of {report.run_id} don't agree: {_hours(report.workers.members)} by events, "
            f"{_hours(report.workers.by_steps)} by steps, which differ by {_difference(report)}; at most "
            f"{RECONCILES:.0%} is expected of a run that is long against its starts, transitions and waits for workers."
        )
    return lines


def _table(
    header: tuple[str, ...],
    reports: Sequence[RunReport],
    rows: Sequence[Row],
    notes: tuple[str, ...] = (),
) -> Table:
    return Table(header, tuple((name, *(cell(report) for report in reports)) for name, cell in rows), notes)


def _time(reports: Sequence[RunReport]) -> Table:
    rows = []
    for use in Use:
        cells = []
        for report in reports:
            spent = next(part for part in report.time if part.use is use)
            if spent.seconds is None:
                cells.append(f"{NOT_MEASURED} ({spent.note})")
            else:
                cells.append(_share(spent.seconds, report.elapsed_s) + (f" ({spent.note})" if spent.note else ""))
        rows.append((str(use), *cells, MEANINGS[use]))
    rows.append(("together", *(_share(report.elapsed_s, report.elapsed_s) for report in reports), ""))
    return Table(("TIME", *(report.run_id for report in reports), ""), tuple(rows))


def _transitions(report: RunReport) -> Table:
    head = (f"TRANSITIONS OF {report.run_id}", "WORKERS", "STEP", "DETECT", "RENDEZVOUS", "TRANSFER", "REBUILD", "SUM")
    return Table(
        head, tuple(_transition(each) for each in report.transitions), ("Seconds; steps done again are in the sum.",)
    )


def _transition(each: TransitionTime) -> tuple[str, ...]:
    parts = (each.detect_s, each.rendezvous_s, each.transfer_s, each.rebuild_s, each.total_s)
    seconds = (NOT_MEASURED if part is None else f"{part:.3f}" for part in parts)
    return (each.kind, f"{each.from_size} -> {each.to_size}", str(each.step), *seconds)


def _share(seconds: float, elapsed_s: float) -> str:
    return f"{seconds:9.2f} s" + (f"  {seconds / elapsed_s:6.1%}" if elapsed_s else "")


def _hours(hours: float) -> str:
    return f"{hours:.4f} h"


def _difference(report: RunReport) -> str:
    difference = report.workers.difference
    return NONE if difference is None else f"{abs(difference):.2%}"


def _attempts(report: RunReport) -> str:
    return f"{len(report.attempts)}: " + ", ".join(span.outcome or "active" for span in report.attempts)


def _steps(report: RunReport) -> str:
    return f"{report.steps:,}" + (f" and {report.wasted_steps:,} wasted" if report.wasted_steps else "")


def _tokens(report: RunReport) -> str:
    return f"{report.tokens:,}" + (f" and {report.wasted_tokens:,} wasted" if report.wasted_tokens else "")


def _energy(reports: Sequence[RunReport]) -> tuple[Row, ...]:
    """A row for each method that any report uses."""
    used = {energy.method for report in reports for energy in report.energy}
    rows = tuple((f"energy, {method}", partial(_kwh, method)) for method in EnergyMethod if method in used)
    return rows or (("energy", lambda _: NOT_MEASURED),)


def _kwh(method: EnergyMethod, report: RunReport) -> str:
    return next((f"{energy.kwh:.4g} kWh" for energy in report.energy if energy.method is method), NOT_MEASURED)


def _energy_notes(reports: Sequence[RunReport]) -> list[str]:
    """Notes on each method and run, without repetitions."""
    notes = [f"Energy, {energy.method}: {energy.note}." for report in reports for energy in report.energy]
    lacking = [f"Energy: {report.energy_note}." for report in reports if report.energy_note]
    return list(dict.fromkeys(notes + lacking))


def _flops(report: RunReport) -> str:
    return f"{report.flops.parameters:.4g}" if report.flops is not None else report.flops_note or NONE


def _attention(report: RunReport) -> str:
    if report.flops is None or report.flops.attention is None:
        return "not known"
    return f"{report.flops.attention:.4g}"


def _active(report: RunReport) -> str:
    return f"{report.flops.active_parameters:,.0f}" if report.flops is not None else "not known"


def _speed(report: RunReport) -> str:
    if report.flops is None or not report.workers.members:
        return NONE
    total = report.flops.parameters + (report.flops.attention or 0.0)
    return f"{total / (3600 * report.workers.members):.4g} FLOP/s"


def _cost(report: RunReport) -> str:
    total = report.cost.total
    return "no price given" if total is None else f"{total:.6g}"


_RUN: tuple[Row, ...] = (
    ("attempts", _attempts),
    ("elapsed", lambda r: duration(r.elapsed_s)),
    ("in the queue", lambda r: duration(r.queued_s)),
    ("paused", lambda r: duration(r.paused_s)),
    ("down", lambda r: duration(r.down_s)),
    ("goodput", lambda r: NONE if r.goodput is None else f"{r.goodput:.1%}"),
    ("steps", _steps),
    ("tokens", _tokens),
    ("tokens per second", lambda r: rate(r.tokens_per_second)),
    ("train loss", lambda r: number(r.loss)),
    ("validation loss", lambda r: number(r.validation_loss)),
    ("transitions", lambda r: counted(len(r.transitions), "transition")),
)
_WORKERS: tuple[Row, ...] = (
    ("members, by events", lambda r: _hours(r.workers.members)),
    ("members, by steps", lambda r: _hours(r.workers.by_steps)),
    ("these differ by", _difference),
    ("held", lambda r: _hours(r.workers.held)),
    ("GPU-hours, held", lambda r: _hours(r.workers.gpu)),
)
_COSTS: tuple[Row, ...] = (
    ("cost of hours held", _cost),
    ("per million tokens", lambda r: NONE if r.cost.per_million_tokens is None else f"{r.cost.per_million_tokens:.6g}"),
    ("active parameters", _active),
    ("FLOPs, parameters", _flops),
    ("FLOPs, attention", _attention),
    ("per member", _speed),
)
_HOURS = (
    "Members train; hours held include standbys and workers that start or wait for room. Pauses are never included."
)
_FLOPS = (
    "FLOPs of steps that count, by formula: 6 x active parameters x tokens (Kaplan et al. 2020) without the input "
    "embedding, and 12 x layers x heads x head size x length x tokens for attention (PaLM, appendix B)."
)
