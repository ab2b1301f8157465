"""Heat map of expert loads over a run's steps: one panel per MoE layer.

    draw_loads(history.loads, "my-run", directory)      # writes experts.png

Importing this module imports matplotlib (0.5 s).
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from orchestrator.policy.health.expert_load import LoadMap, load_map
from orchestrator.protocol.expert_load import Loads
from orchestrator.tracking.charts import FAINT, GRID, INK

FILE = "experts.png"
MOST_LAYERS = 12
MOST_IN_COLUMN = 4
MOST_LOAD = 3.0  # relative to the mean; larger loads have the same colour
COLOURS = "RdBu_r"  # blue below the mean, white at it, red above
EXPERT_INCHES, PANEL_INCHES, EDGE_INCHES = 0.14, (1.3, 2.4), 1.2


def draw_loads(loads: Mapping[int, Loads], title: str, directory: Path, moves: Iterable[int] = ()) -> tuple[Path, ...]:
    """Write the picture. Returns its path; empty if no tokens were routed to experts.

    Args:
        moves: steps from which on experts were placed by their loads.
    """
    found = load_map(loads, moves)
    if found is None:
        return ()
    path = directory / FILE
    load_figure(found, title).savefig(path, dpi=140)
    return (path,)


def load_figure(loads: LoadMap, title: str) -> Figure:
    """One panel per layer in the model's order; of more than `MOST_LAYERS` layers, only the least even ones."""
    num_layers, num_experts, _ = loads.load_LES.shape
    layers = _least_even(loads.load_LES)
    columns = math.ceil(len(layers) / MOST_IN_COLUMN)
    rows = math.ceil(len(layers) / columns)
    panel_inches = float(np.clip(EXPERT_INCHES * num_experts, *PANEL_INCHES))
    figure = Figure(figsize=(10, EDGE_INCHES + panel_inches * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    norm = TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=MOST_LOAD)
    edges = _edges(loads.steps)
    for place, axes in enumerate(panels.T.flat):
        if place >= len(layers):
            axes.set_visible(False)
            continue
        _draw_layer(axes, edges, loads.load_LES[layers[place]], norm)
        for step in loads.moves:
            axes.axvline(step - 0.5, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
        axes.set_title(f"MoE layer {layers[place]}", loc="left", color=INK, fontsize=9)
    for axes in panels[:, 0]:
        axes.set_ylabel("expert", color=INK, fontsize=9)
    for column in range(columns):
        lowest = panels[min(rows, len(layers) - column * rows) - 1, column]
        lowest.set_xlabel("step", color=INK)
        lowest.tick_params(labelbottom=True)
    bar = figure.colorbar(ScalarMappable(norm, COLOURS), ax=panels, ticks=range(4), extend="max", shrink=0.8, aspect=30)
    bar.set_label("load of an expert / mean load", color=INK)
    bar.ax.tick_params(colors=FAINT, labelcolor=INK, labelsize=9)
    left_out = f", the {len(layers)} least even of {num_layers} MoE layers" if len(layers) < num_layers else ""
    moved = "; dashed: experts were placed by load" if loads.moves else ""
    figure.suptitle(f"{title}: loads of experts{left_out}{moved}", x=0.01, ha="left", color=INK, fontsize=12)
    return figure


def _draw_layer(axes: Axes, edges: NDArray[np.float64], load_ES: NDArray[np.float64], norm: TwoSlopeNorm) -> None:
    """Draw one layer; steps without tokens stay grey."""
    axes.set_facecolor(GRID)
    rows = np.arange(len(load_ES) + 1) - 0.5
    # Rasterized: in SVG each cell would be a path of its own.
    axes.pcolormesh(edges, rows, np.ma.masked_invalid(load_ES), cmap=COLOURS, norm=norm, rasterized=True)
    axes.set_ylim(len(load_ES) - 0.5, -0.5)  # expert 0 above
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.tick_params(colors=FAINT, labelcolor=INK, labelsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _least_even(load_LES: NDArray[np.float64]) -> list[int]:
    """Up to `MOST_LAYERS` layers with the highest load of the fullest expert, summed over steps; ascending indices."""
    fullest_L = np.nansum(np.nan_to_num(load_LES).max(1), axis=-1)
    return sorted(np.argsort(-fullest_L, kind="stable")[:MOST_LAYERS].tolist())


def _edges(steps: tuple[int, ...]) -> NDArray[np.float64]:
    """Borders of the columns, half-way between steps. The outer halves are as wide as the inner ones."""
    middles = np.asarray(steps, dtype=np.float64)
    if len(middles) == 1:
        return np.array([middles[0] - 0.5, middles[0] + 0.5])
    between = (middles[1:] + middles[:-1]) / 2
    return np.array([2 * middles[0] - between[0], *between, 2 * middles[-1] - between[-1]])
