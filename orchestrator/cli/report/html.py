"""A run's report as one self-contained HTML file. Imports matplotlib."""

import html
from collections.abc import Sequence
from pathlib import Path

from orchestrator.cli.report.tables import Table, warnings
from orchestrator.cli.terminal.format import NONE
from orchestrator.errors import StorageError
from orchestrator.policy.health.expert_load import LoadMap
from orchestrator.policy.report.report import RunReport
from orchestrator.storage.atomic import write_atomically
from orchestrator.tracking.html import page_of, svg_of, table_of
from orchestrator.tracking.load_chart import load_figure
from orchestrator.tracking.report_charts import time_figure, transitions_figure, workers_figure


def write_page(
    path: Path, reports: Sequence[RunReport], tables: Sequence[Table], load_maps: Sequence[LoadMap | None]
) -> None:
    """Write the page, in place of an older one.

    Args:
        load_maps: of the experts of each report's run; None for one without.

    Raises:
        StorageError: the file can't be written.
    """
    text = _page(reports, tables, load_maps)
    try:
        write_atomically(path, text)
    except OSError as error:
        raise StorageError(
            f"{path} can't be written: {error.strerror or error}",
            remedy="Name a file in a directory that is there and can be written: --out FILE.",
            unchanged="Nothing was written.",
        ) from error


def _page(reports: Sequence[RunReport], tables: Sequence[Table], load_maps: Sequence[LoadMap | None]) -> str:
    """Figures first, then the tables that the terminal shows too."""
    figures = [time_figure(reports)]
    for report, load_map in zip(reports, load_maps, strict=True):
        figures.append(workers_figure(report))
        figures += [transitions_figure(report)] if report.transitions else []
        figures += [load_figure(load_map, report.run_id)] if load_map is not None else []
    parts = [f'<p class="warning">{html.escape(line)}</p>\n' for report in reports for line in warnings(report)]
    parts += map(svg_of, figures)
    parts += [table_of(table.header, table.rows, table.notes) for table in tables]
    head = " and ".join(report.run_id for report in reports)
    return page_of(f"Report of {head}", "; ".join(map(_told, reports)), "".join(parts))


def _told(report: RunReport) -> str:
    goodput = NONE if report.goodput is None else f"{report.goodput:.1%}"
    return f"{report.run_id}: {report.outcome or 'active'}, {report.steps:,} steps, goodput {goodput}"
