"""Chart of a run's history: loss over steps, world size below, and marks at events.

    draw(history, "my-run", directory)      # writes story.png, and story.html with the events beside it

Importing this module imports matplotlib (0.5 s).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from orchestrator.tracking.history import Curve, History, RunEvent, rows_of
from orchestrator.tracking.html import page_of, svg_of, table_of
from orchestrator.tracking.sinks.sink import PICTURE

HTML_FILE = "story.html"

INK, FAINT, GRID = "#22303c", "#8595a3", "#e4e9ed"
TRAIN, EVAL, WORLD, LOST = "#2f6fb0", "#d1701f", "#5b7f53", "#c0392b"
LABEL_GAP = 0.045  # of the width: labels nearer than this to the one before are left out


@dataclass(frozen=True)
class Mark:
    """Appearance of a kind of event, and its name in the legend."""

    meaning: str
    colour: str
    symbol: str  # matplotlib marker; at the top of the loss panel, or at its bottom if it `is_quiet`
    has_line: bool  # through both panels
    is_quiet: bool = False


MARKS = {
    "rescaled": Mark("rescale", WORLD, "v", has_line=True),
    "recovered": Mark("recovery", WORLD, "P", has_line=False),
    "worker_lost": Mark("worker lost", LOST, "X", has_line=True),
    "state_differs": Mark("replay not identical", LOST, "*", has_line=True),
    "batch_skipped": Mark("batch left out", LOST, "s", has_line=False),
    "micro_batch_reduced": Mark("smaller micro-batch", INK, "1", has_line=False),
    "micro_batch_fitted": Mark("micro-batch fitted", INK, "+", has_line=False),
    "experts_collapsed": Mark("experts collapsed", LOST, "h", has_line=True),
    "loads_swing": Mark("expert loads swing", LOST, "H", has_line=False),
    "straggler": Mark("straggler", LOST, "d", has_line=False),
    "transition_abandoned": Mark("transition abandoned", LOST, "x", has_line=False),
    "resumed": Mark("resumed", INK, ">", has_line=True),
    "stage": Mark("stage", EVAL, "D", has_line=True),
    "checkpoint": Mark("checkpoint", FAINT, "^", has_line=False, is_quiet=True),
}


def draw(history: History, title: str, directory: Path) -> tuple[Path, Path]:
    """Write the picture and the page. Returns their paths."""
    png, page = directory / PICTURE, directory / HTML_FILE
    figure = figure_of(history, title)
    figure.savefig(png, dpi=140)
    figure.axes[0].set_title("", loc="left")  # the page has it as its heading
    head, *rows = [[str(cell) for cell in row] for row in rows_of(history)]
    events = table_of(head, rows[::-1])
    body = f"{svg_of(figure)}<h2>Events, the newest first</h2>\n{events}"
    page.write_text(page_of(title, _told(history), body), encoding="utf-8")
    return png, page


def figure_of(history: History, title: str) -> Figure:
    figure = Figure(figsize=(10, 6), layout="constrained")
    loss_axes, world_axes = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    train = finite(history.curves["train/loss"])
    validation = finite(history.curves["eval/loss"])
    for axes in (loss_axes, world_axes):
        plain(axes)
    _draw_loss(loss_axes, train, validation)
    world = history.curves["elastic/world_size"]
    world_axes.step(*_columns(world), where="post", color=WORLD, linewidth=1.6)
    world_axes.fill_between(*_columns(world), step="post", color=WORLD, alpha=0.15, linewidth=0)
    world_axes.set_ylabel("world size\n(workers)", color=INK)
    world_axes.set_xlabel("step", color=INK)
    world_axes.set_ylim(0, max((size for _, size in world), default=1) * 1.2)
    for axis in (world_axes.yaxis, world_axes.xaxis):
        axis.set_major_locator(MaxNLocator(nbins=3 if axis is world_axes.yaxis else 10, integer=True))
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    used = _draw_marks(loss_axes, world_axes, history.events)
    handles, labels = loss_axes.get_legend_handles_labels()
    for mark in used:
        handles.append(Line2D([], [], color=mark.colour, marker=mark.symbol, linestyle="none", markersize=6))
        labels.append(mark.meaning)
    figure.legend(handles, labels, loc="outside lower center", ncols=8, frameon=False, fontsize=9, labelcolor=INK)
    loss_axes.set_title(title, loc="left", color=INK, fontsize=13, fontweight="bold", pad=24)
    return figure


def _draw_loss(axes: Axes, train: Curve, validation: Curve) -> None:
    steps, losses = _columns(train)
    window = max(1, len(train) // 100)
    if window > 2:  # raw values in the background, their moving average in front
        axes.plot(steps, losses, color=TRAIN, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smoothed(losses, window), color=TRAIN, linewidth=1.6, label=f"train, mean of {window} values")
    else:
        axes.plot(steps, losses, color=TRAIN, linewidth=1.6, label="train")
    if validation:
        axes.plot(*_columns(validation), color=EVAL, marker="o", markersize=3.5, linewidth=1.2, label="validation")
    axes.set_ylabel("loss (nats per token)", color=INK)
    axes.margins(x=0.02, y=0.08)


def _draw_marks(loss_axes: Axes, world_axes: Axes, events: Sequence[RunEvent]) -> list[Mark]:
    """Draw symbols at the borders of the loss, lines through both panels, and sizes above rescales if they fit."""
    low, high = loss_axes.get_xlim()
    upper, lower = loss_axes.get_xaxis_transform(), 0.0
    labelled = -math.inf
    used: dict[str, Mark] = {}
    for event in sorted(events, key=lambda event: event.step):
        mark = MARKS.get(event.kind)
        if mark is None:
            continue
        used[event.kind] = mark
        changes = event.kind in ("rescaled", "recovered")
        step = event.step + 1 if changes else max(event.step, 0)  # the new world's first step
        loss_axes.plot(
            [step],
            [lower if mark.is_quiet else 1.0],
            transform=upper,
            marker=mark.symbol,
            markersize=4 if mark.is_quiet else 6,
            color=mark.colour,
            linestyle="none",
            clip_on=False,
            zorder=5,
        )
        if mark.has_line:
            for axes in (loss_axes, world_axes):
                axes.axvline(step, color=mark.colour, linewidth=0.8, alpha=0.45, zorder=0)
        if changes and step - labelled >= LABEL_GAP * (high - low):
            text = f"{event.fields['from_size']}→{event.fields['to_size']}"
            text = "experts" if event.fields.get("experts_moved") else text
            if numbers := event.fields.get("experts"):
                text = f"{numbers[0]}→{numbers[1]} experts"
            loss_axes.annotate(
                text,
                (step, 1.0),
                xycoords=upper,
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=mark.colour,
            )
            labelled = step
    loss_axes.set_xlim(low, high)
    return list(used.values())


def finite(curve: Curve) -> Curve:
    return tuple((step, value) for step, value in curve if math.isfinite(value))


def _told(history: History) -> str:
    loss = finite(history.curves["train/loss"])
    if not loss:
        return "no steps yet"
    kinds = [event.kind for event in history.events]
    counted = [f"rescaled {kinds.count('rescaled')} times", f"workers lost {kinds.count('worker_lost')}"]
    return ", ".join([f"{loss[-1][0] + 1:,} steps", f"train loss {loss[0][1]:.3f} → {loss[-1][1]:.3f}", *counted])


def _smoothed(values: Sequence[float], window: int) -> list[float]:
    """Centred moving average over `window` values, fewer at the ends."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    bounds = [(max(0, n - window // 2), min(len(values), n + window - window // 2)) for n in range(len(values))]
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in bounds]


def _columns(curve: Curve) -> tuple[list[int], list[float]]:
    return [step for step, _ in curve], [value for _, value in curve]


def plain(axes: Axes) -> None:
    """Remove the frame and draw faint horizontal lines."""
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, labelcolor=INK, labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
