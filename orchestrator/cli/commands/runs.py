"""`submit`, `ls`, `status`, `wait`: runs and their status."""

import time
from typing import Annotated

import typer

from orchestrator.cli.terminal.format import NONE, moment, number, progress
from orchestrator.cli.terminal.options import (
    RUNS,
    Address,
    JobFile,
    Name,
    Output,
    Range,
    RunId,
    Set,
    Storage,
    Timeout,
    Watch,
    overrides_of,
)
from orchestrator.cli.terminal.output import (
    Format,
    narrate,
    narrate_wait,
    show,
    show_answer,
    show_json,
    show_line,
    show_table,
)
from orchestrator.cluster.jobs_api import is_url
from orchestrator.protocol.codec import to_plain
from orchestrator.protocol.status import RunStatus


def submit(
    job: JobFile,
    name: Name = None,
    settings: Set = None,
    workers: Range = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check the job, and show its destination.")] = False,
    timeout: Timeout = None,
    address: Address = None,
    output: Output = Format.TEXT,
) -> None:
    """Submit a run and return; prints its name. To the URL of a Jobs API it sends the current directory too."""
    from orchestrator.client import OrchestratorClient, check_job

    overrides = overrides_of(settings, workers)
    if is_url(address):
        from orchestrator.cli.commands.remote import submit_by_url

        run_id, _ = submit_by_url(str(address), job, name, overrides, timeout, dry_run)
        show_name(run_id, output)
        return
    spec = check_job(job, name, overrides)  # before connecting to a cluster
    client = OrchestratorClient(address)
    if dry_run:
        narrate(
            f"Run {spec.name} would be submitted to {client.address} and stored in {spec.storage}. Nothing was started."
        )
        show_name(spec.name, output)
        return
    run_id = client.submit(job, name=name, overrides=overrides, timeout_s=timeout, on_wait=narrate_wait)
    narrate(f"Run {run_id} is submitted. Follow it with `orchestrator logs {run_id} -f`.")
    show_name(run_id, output)


def list_runs(
    watch: Watch = False, storage: Storage = None, address: Address = None, output: Output = Format.TEXT
) -> None:
    """List the runs of the cluster, or of run storage, the newest last. Watching ends when all have ended."""
    from orchestrator.cli.terminal.progress import watch_runs
    from orchestrator.cli.terminal.run_lookup import find_runs

    look = find_runs(storage, address)
    if watch:
        watch_runs(look, (lambda s: show_line(to_plain(s))) if output is Format.JSON else None)
        if output is Format.JSON:
            return
    found = look()
    if output is Format.JSON:
        show_json([to_plain(status) for status in found])
        return
    header = ("RUN", "PRIORITY", "PHASE", "STEP", "LOSS", "WORKERS", "SUBMITTED")
    rows = [
        (
            s.run_id,
            str(s.priority),
            s.phase,
            f"{s.step}/{s.steps}",
            number(s.loss),
            str(s.workers_now or NONE),
            moment(s.submitted_time),
        )
        for s in found
    ]
    show_table(header, rows)


def status(
    run: RunId, watch: Watch = False, storage: Storage = None, address: Address = None, output: Output = Format.TEXT
) -> None:
    """Show a run's progress and state, or how it ended. Watching ends with the run."""
    from orchestrator.cluster.published.status_reader import published_status

    found = published_status(run, address) if storage is None and not watch else None
    if found is None:
        found = _looked_up(run, watch, storage, address, output)
    if output is Format.JSON:
        if not watch:
            show_json(to_plain(found))
        return
    from orchestrator.cli.terminal.summary import aligned, details

    if found.traceback:
        show(found.traceback.rstrip())
    show(aligned(details(found, time.time())))


def _looked_up(run: str, watch: bool, storage: str | None, address: str | None, output: Format) -> RunStatus:
    """The run's status from its cluster or from run storage, with `watch` at its end."""
    from orchestrator.cli.terminal.progress import watch_runs
    from orchestrator.cli.terminal.run_lookup import find_run

    place = find_run(run, storage, address)
    if watch:
        on_change = (lambda s: show_line(to_plain(s))) if output is Format.JSON else None
        watch_runs(lambda: (place.status(),), on_change, place.is_over, place.look_every_s)
    return place.status()


def wait(
    run: RunId,
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout",
            min=0,
            metavar="SECONDS",
            help="How long. Default: to the run's end; with --storage until its journal has not been written for two "
            "minutes.",
        ),
    ] = None,
    storage: Storage = None,
    address: Address = None,
    output: Output = Format.TEXT,
) -> None:
    """Wait for a run's end, and exit with its code: 0 succeeded, 100 failed, 103 stopped, 101 paused or not ended."""
    from orchestrator.cli.terminal.run_lookup import find_run
    from orchestrator.client import raise_unless_succeeded

    found = find_run(run, storage, address).wait(timeout)
    show_answer(output, found, progress(found))
    raise_unless_succeeded(found)


def show_name(run_id: str, output: Format) -> None:
    from orchestrator.cli.terminal.answers import NamedRun

    show_answer(output, NamedRun(run_id), run_id)


def register(app: typer.Typer) -> None:
    for name, command in (("submit", submit), ("ls", list_runs), ("status", status), ("wait", wait)):
        app.command(name, rich_help_panel=RUNS)(command)
