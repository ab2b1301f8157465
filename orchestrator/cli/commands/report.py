"""`report`: cost and results of a run, alone or beside another."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.terminal.options import Address, RunId, Storage
from orchestrator.cli.terminal.output import say, show, show_json, show_table


class ReportFormat(StrEnum):
    TEXT = "text"
    JSON = "json"
    HTML = "html"


def report(
    run: RunId,
    other: Annotated[
        str | None, typer.Argument(metavar="[OTHER]", help="A second run, shown beside it.", show_default=False)
    ] = None,
    cost_per_worker_hour: Annotated[
        float | None,
        typer.Option("--cost-per-worker-hour", metavar="X", help="In any currency.", show_default=False),
    ] = None,
    watts_per_worker: Annotated[
        float | None,
        typer.Option("--watts-per-worker", metavar="W", help="Adds modelled energy to the measured."),
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FILE", help="The page. Default: report.html in the run's directory.")
    ] = None,
    storage: Storage = None,
    address: Address = None,
    output: Annotated[
        ReportFormat, typer.Option("-o", "--output", help="Format; html prints the path of the page.")
    ] = ReportFormat.TEXT,
) -> None:
    """Account for a run: goodput, where time went, worker-hours, energy, tokens, FLOPs, cost. Two runs side by side."""
    from orchestrator.cli.report.tables import tables, warnings
    from orchestrator.cli.terminal.run_lookup import find_run
    from orchestrator.errors import UsageError
    from orchestrator.policy.report.report import Rates
    from orchestrator.protocol.codec import to_plain
    from orchestrator.submission.report import read_load_map, read_report

    rates = Rates(cost_per_worker_hour, watts_per_worker)
    if to is not None and output is not ReportFormat.HTML:
        raise UsageError(
            f"--to {to} names a page, and the output is {output}",
            remedy="Add -o html, or leave --to out.",
            unchanged="Nothing was written.",
        )
    directories = [find_run(name, storage, address).files.run_dir for name in (run, other) if name is not None]
    reports = [read_report(directory, rates) for directory in directories]
    for line in (line for one in reports for line in warnings(one)):
        say(line)
    if output is ReportFormat.JSON:
        plain = [to_plain(one) for one in reports]
        show_json(plain if other is not None else plain[0])
    elif output is ReportFormat.HTML:
        from orchestrator.cli.report.html import write_page

        name = "report.html" if other is None else f"report-with-{other}.html"
        page = to.absolute() if to is not None else directories[0] / name
        write_page(page, reports, tables(reports), [read_load_map(directory) for directory in directories])
        show(str(page))
    else:
        for table in tables(reports):
            show_table(table.header, table.rows)
            show("".join(f"{note}\n" for note in table.notes))


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Records")(report)
