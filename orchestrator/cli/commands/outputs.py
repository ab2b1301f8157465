"""`logs`, `events`, `report`: records of a run."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.terminal.format import event as event_line
from orchestrator.cli.terminal.options import RUNS, Address, Follow, Output, RunId, Since, Storage, Tail, since_s
from orchestrator.cli.terminal.output import Format, narrate, show, show_json, show_line, show_table
from orchestrator.protocol.codec import to_plain


class ReportFormat(StrEnum):
    TEXT = "text"
    JSON = "json"
    HTML = "html"


def logs(
    run: RunId,
    follow: Follow = False,
    worker: Annotated[
        str | None, typer.Option("--worker", metavar="ID", help="Only this process: w0, controller, tracker, …")
    ] = None,
    tail: Tail = None,
    since: Since = None,
    storage: Storage = None,
    address: Address = None,
    output: Output = Format.TEXT,
) -> None:
    """Print the log lines of a run's processes, merged by time, after the traceback of the error that ended the run."""
    from orchestrator.cli.terminal.run_lookup import find_run

    begin_s, found = since_s(since), find_run(run, storage, address)
    if output is Format.TEXT and worker is None and (traceback := found.status().traceback):
        show(traceback.rstrip() + "\n")
    try:
        for line in found.files.logs(found.is_over if follow else None, worker, tail, begin_s, found.look_every_s):
            if output is Format.JSON:
                show_line(to_plain(line))
            else:
                show(f"{line.stamp}  {line.source:<12}  {line.text}")
    except KeyboardInterrupt:
        raise typer.Exit from None  # Ctrl-C ends following


def events(
    run: RunId,
    follow: Follow = False,
    tail: Tail = None,
    since: Since = None,
    storage: Storage = None,
    address: Address = None,
    output: Output = Format.TEXT,
) -> None:
    """Print a run's events: generations, rescales, checkpoints, failures of workers, its end. With -f -o json one JSON
    object per line."""
    from orchestrator.cli.terminal.run_lookup import find_run

    begin_s, found = since_s(since), find_run(run, storage, address)
    if output is Format.JSON and not follow:
        show_json(found.files.events(begin_s, tail))
        return
    try:
        is_over = found.is_over if follow else lambda: True
        for event in found.files.events_to_come(is_over, begin_s, tail, found.look_every_s):
            if output is Format.JSON:
                show_line(event)
            else:
                show(event_line(event))
                sys.stdout.flush()
    except KeyboardInterrupt:
        raise typer.Exit from None  # Ctrl-C ends following


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
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="The page. Default: report.html in the run's directory."),
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
    from orchestrator.submission.report import read_load_map, read_report

    rates = Rates(cost_per_worker_hour, watts_per_worker)
    if out is not None and output is not ReportFormat.HTML:
        raise UsageError(
            f"--out {out} names a page, and the output is {output}",
            remedy="Add -o html, or leave --out out.",
            unchanged="Nothing was written.",
        )
    found = [find_run(name, storage, address).files for name in (run, other) if name is not None]
    reports = [read_report(files.run_dir, rates) for files in found]
    for line in (line for one in reports for line in warnings(one)):
        narrate(line)
    if output is ReportFormat.JSON:
        plain = [to_plain(one) for one in reports]
        show_json(plain if other is not None else plain[0])
    elif output is ReportFormat.HTML:
        from orchestrator.cli.report.html import write_page

        name = "report.html" if other is None else f"report-with-{other}.html"
        page = out.absolute() if out is not None else found[0].directory / name
        write_page(page, reports, tables(reports), [read_load_map(files.run_dir) for files in found])
        show(str(page))
    else:
        for table in tables(reports):
            show_table(table.header, table.rows)
            show("".join(f"{note}\n" for note in table.notes))


def register(main: typer.Typer) -> None:
    for command in (logs, events, report):
        main.command(rich_help_panel=RUNS)(command)
