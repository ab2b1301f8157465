"""Charts of a run's report: time by use, number of workers, and duration of each transition.

Importing this module imports matplotlib (0.5 s).
"""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from orchestrator.policy.report.goodput import Use
from orchestrator.policy.report.report import RunReport
from orchestrator.tracking.charts import FAINT, GRID, INK, LOST, WORLD, plain

COLOURS = {
    Use.COMPUTE: "#2f6fb0",
    Use.COMMUNICATION: "#7fb0dc",
    Use.DATA_WAIT: "#d1701f",
    Use.PROTECTION: "#e8b27f",
    Use.BETWEEN: "#f3dcc4",
    Use.WASTED: "#c0392b",
    Use.START: "#c9d2d9",
    Use.DETECT: "#8e5ea2",
    Use.RENDEZVOUS: "#b79ac8",
    Use.TRANSFER: "#5b7f53",
    Use.REBUILD: "#a3c09c",
    Use.END: "#8595a3",
}
DARK = (Use.COMPUTE, Use.WASTED, Use.DETECT, Use.TRANSFER)
PARTS_OF_MOVE = (Use.DETECT, Use.RENDEZVOUS, Use.TRANSFER, Use.REBUILD, Use.WASTED)
LABELLED = 0.045  # share of the bar: smaller parts get no number
MOST_TRANSITIONS = 40  # the newest are shown
BAR_INCHES, EDGE_INCHES = 0.42, 1.15


def time_figure(reports: Sequence[RunReport]) -> Figure:
    """A bar per run: shares of its elapsed time by use."""
    figure, axes = _bars(len(reports))
    names = [f"{report.run_id}\n{_lasting(report.elapsed_s)}" for report in reports]
    used = []
    for use in Use:
        shares = [report.seconds(use) / report.elapsed_s if report.elapsed_s else 0.0 for report in reports]
        if not any(shares):
            continue
        used.append(use)
        starts = [
            sum(report.seconds(earlier) for earlier in used[:-1]) / report.elapsed_s if report.elapsed_s else 0.0
            for report in reports
        ]
        axes.barh(names, shares, left=starts, color=COLOURS[use], height=0.62)
        for row, (start, share) in enumerate(zip(starts, shares, strict=True)):
            if share >= LABELLED:
                ink = "white" if use in DARK else INK
                axes.text(start + share / 2, row, f"{share:.0%}", ha="center", va="center", fontsize=8, color=ink)
    axes.set_ylim(len(names) - 0.5, -0.5)  # the first one above
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("share of the elapsed time, pauses apart", color=INK)
    _legend(figure, used)
    return figure


def workers_figure(report: RunReport) -> Figure:
    """Members and all workers held, over the time of the run's attempts; time between attempts is left out."""
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    axes = figure.subplots()
    plain(axes)
    unit, scale = _scale(report.elapsed_s)
    times = [_elapsed_s(report, count.time_s) / scale for count in report.headcounts]
    held, members = ([getattr(count, kind) for count in report.headcounts] for kind in ("held", "members"))
    axes.fill_between(times, held, step="post", color=FAINT, alpha=0.25, linewidth=0, label="held")
    axes.step(times, members, where="post", color=WORLD, linewidth=1.6, label="members")
    losses = [_elapsed_s(report, each.began_s) / scale for each in report.transitions if each.kind == "recovery"]
    resumed = [_elapsed_s(report, span.began_s) / scale for span in report.attempts[1:]]
    _upright(axes, losses, LOST, "-", "worker failure")
    _upright(axes, resumed, INK, ":", "run ended and was resumed")
    axes.set_ylim(0, max(held, default=1) * 1.2 + 0.1)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.set_ylabel("workers", color=INK)
    axes.set_xlabel(f"time, pauses apart ({unit})", color=INK)
    axes.set_title(report.run_id, loc="left", color=INK, fontsize=10)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9, labelcolor=INK)
    return figure


def transitions_figure(report: RunReport) -> Figure:
    """A bar per transition, for the newest `MOST_TRANSITIONS`: seconds by part."""
    transitions = report.transitions[-MOST_TRANSITIONS:]
    figure, axes = _bars(len(transitions))
    rows = list(range(len(transitions)))
    lefts = [0.0] * len(transitions)
    used = []
    for use in PARTS_OF_MOVE:
        name = "wasted_s" if use is Use.WASTED else f"{use}_s"
        seconds = [getattr(each, name) or 0.0 for each in transitions]
        if any(seconds):
            used.append(use)
            axes.barh(rows, seconds, left=lefts, color=COLOURS[use], height=0.62)
            lefts = [left + part for left, part in zip(lefts, seconds, strict=True)]
    axes.set_yticks(rows, [f"{each.kind} {each.from_size}→{each.to_size}, step {each.step}" for each in transitions])
    axes.set_ylim(len(transitions) - 0.4, -0.6)  # the first one above
    axes.set_xlabel("seconds", color=INK)
    axes.set_title(report.run_id, loc="left", color=INK, fontsize=10)
    _legend(figure, used)
    return figure


def _bars(count: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(10, EDGE_INCHES + BAR_INCHES * max(count, 1)), layout="constrained")
    axes = figure.subplots()
    plain(axes)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.grid(visible=False, axis="y")
    return figure, axes


def _elapsed_s(report: RunReport, time_s: float) -> float:
    """Seconds of the run's attempts that had passed at `time_s`."""
    return sum(max(0.0, min(time_s, span.ended_s) - span.began_s) for span in report.attempts)


def _upright(axes: Axes, places: Sequence[float], colour: str, style: str, meaning: str) -> None:
    """Vertical lines across the axes, with one entry in the legend."""
    for place in places:
        axes.axvline(place, color=colour, linewidth=0.9, linestyle=style, label=meaning if place is places[0] else None)


def _legend(figure: Figure, uses: Sequence[Use]) -> None:
    patches = [Patch(color=COLOURS[use], label=str(use)) for use in uses]
    figure.legend(handles=patches, loc="outside lower center", ncols=6, frameon=False, fontsize=8, labelcolor=INK)


def _scale(seconds: float) -> tuple[str, float]:
    if seconds < 600:
        return "s", 1.0
    return ("min", 60.0) if seconds < 3 * 3600 else ("h", 3600.0)


def _lasting(seconds: float) -> str:
    unit, scale = _scale(seconds)
    return f"{seconds / scale:.1f} {unit}"
