"""`logs`, `events`, `audit`: records of a run."""

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from orchestrator.cli.terminal.format import event as event_line
from orchestrator.cli.terminal.options import Address, Output, RunId, Storage
from orchestrator.cli.terminal.output import Format, show, show_json, show_line


def logs(
    run: RunId,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the run has ended.")] = False,
    worker: Annotated[
        str | None, typer.Option("--worker", metavar="ID", help="Only this process: w0, controller, tracker, …")
    ] = None,
    tail: Annotated[
        int | None, typer.Option("--tail", min=0, metavar="N", help="Only the newest lines so far.")
    ] = None,
    storage: Storage = None,
    address: Address = None,
    output: Output = Format.TEXT,
) -> None:
    """Print the log lines of a run's processes, merged by time, after the traceback of the error that ended the run."""
    from orchestrator.cli.terminal.run_lookup import find_run

    found = find_run(run, storage, address)
    if output is Format.TEXT and worker is None and (traceback := found.status().traceback):
        show(traceback.rstrip() + "\n")
    try:
        for line in found.files.logs(found.is_over if follow else None, worker, tail):
            if output is Format.JSON:
                show_line(asdict(line))
            else:
                show(f"{line.stamp}  {line.source:<12}  {line.text}")
    except KeyboardInterrupt:
        raise typer.Exit from None  # Ctrl-C ends following


def events(
    run: RunId,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Go on until the run has ended; with -o json a line each.")
    ] = False,
    storage: Storage = None,
    address: Address = None,
    output: Output = Format.TEXT,
) -> None:
    """Print a run's events: generations, rescales, checkpoints, failures of workers, its end."""
    from orchestrator.cli.terminal.run_lookup import find_run

    found = find_run(run, storage, address)
    if output is Format.JSON and not follow:
        show_json(found.files.events())
        return
    try:
        for event in found.files.events_to_come(found.is_over if follow else lambda: True):
            if output is Format.JSON:
                show_line(event)
            else:
                show(event_line(event))
                sys.stdout.flush()
    except KeyboardInterrupt:
        raise typer.Exit from None  # Ctrl-C ends following


def audit(run: RunId, storage: Storage = None, address: Address = None, output: Output = Format.TEXT) -> None:
    """Prove from a run's ledger that each sample was used exactly once, in order. Exits 100 if not."""
    from orchestrator.cli.terminal.run_lookup import find_run

    result = find_run(run, storage, address).files.audit()
    if output is Format.JSON:
        show_json(asdict(result))
    else:
        for problem in result.problems:
            show(problem)
        verdict = "each exactly once, in order" if result.ok else f"{len(result.problems)} problems"
        show(f"{result.steps} committed steps consumed {result.positions} sample positions: {verdict}")
        if result.left_out:
            steps = ", ".join(str(step) for step in result.left_out)
            show(f"not trained on, since they had made the loss explode: the batches of steps {steps}")
    if not result.ok:
        raise typer.Exit(100)


def register(app: typer.Typer) -> None:
    for command in (logs, events, audit):
        app.command(rich_help_panel="Records")(command)
