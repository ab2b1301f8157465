"""A run's report as one HTML file that needs nothing else. Imports matplotlib."""

import html
import io
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from matplotlib.figure import Figure

from orchestrator.cli.accounts import Table, warnings
from orchestrator.cli.wording import NONE
from orchestrator.control.journal import write_atomically
from orchestrator.errors import StorageError
from orchestrator.policy.report import RunReport
from orchestrator.tracking.report_charts import moves_figure, time_figure, workers_figure


def write_page(path: Path, reports: Sequence[RunReport], tables: Sequence[Table]) -> None:
    """Write the page, in place of an older one.

    Raises:
        StorageError: the file can't be written.
    """
    text = page_of(reports, tables)
    try:
        write_atomically(path, text)
    except OSError as error:
        raise StorageError(
            f"{path} can't be written: {error.strerror or error}",
            remedy="Name a file in a directory that is there and can be written: --to FILE.",
            unchanged="Nothing was written.",
        ) from error


def page_of(reports: Sequence[RunReport], tables: Sequence[Table]) -> str:
    """Figures first, then the tables that the terminal shows too."""
    figures = [time_figure(reports)]
    for report in reports:
        figures.append(workers_figure(report))
        figures += [moves_figure(report)] if report.moves else []
    head = " and ".join(report.run_id for report in reports)
    return PAGE.format(
        title=html.escape(f"Report of {head}"),
        told=html.escape("; ".join(_told(report) for report in reports)),
        warnings="".join(f'<p class="warning">{html.escape(line)}</p>\n' for r in reports for line in warnings(r)),
        figures="\n".join(_svg(figure) for figure in figures),
        tables="\n".join(_html(table) for table in tables),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _told(report: RunReport) -> str:
    goodput = NONE if report.goodput is None else f"{report.goodput:.1%}"
    return f"{report.run_id}: {report.outcome or 'goes on'}, {report.steps:,} steps, goodput {goodput}"


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg")
    text = out.getvalue()
    return text[text.index("<svg") :]


def _html(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header)
    rows = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in table.rows)
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in table.notes)
    return f"<table>\n<tr>{head}</tr>\n{body}\n</table>\n{notes}"


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
 body {{ margin: 2rem auto; max-width: 64rem; padding: 0 1rem; color: #22303c;
        font: 15px/1.5 system-ui, "Segoe UI", sans-serif }}
 h1 {{ font-size: 1.4rem; margin: 0 }}
 p {{ margin: .2rem 0 1rem; color: #5c6b78 }}
 p.warning {{ color: #c0392b }}
 svg {{ width: 100%; height: auto; margin-bottom: 1rem }}
 table {{ border-collapse: collapse; width: 100%; font-size: 13px; margin-top: 1.5rem }}
 th {{ text-align: left; border-bottom: 2px solid #e4e9ed }}
 td {{ border-bottom: 1px solid #e4e9ed; vertical-align: top; font-variant-numeric: tabular-nums }}
 th, td {{ padding: .3rem .8rem .3rem 0 }}
 td:first-child {{ white-space: nowrap }}
</style>
<h1>{title}</h1>
<p>{told}</p>
{warnings}{figures}
{tables}
<p>Written {written}.</p>
</html>
"""
