"""`submit`, `list`, `status`, `scale`, `cancel`: steering runs."""

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.options import Address, JobFile, Name, Output, RunId, Storage, Timeout
from orchestrator.cli.output import Format, say, show, show_json, show_table, tell_wait
from orchestrator.cli.wording import NONE, counted, moment, number


def submit(job: JobFile, name: Name = None, timeout: Timeout = 0.0, address: Address = None) -> None:
    """Start a run and return; prints its name."""
    from orchestrator.client import OrchestratorClient, check_job

    check_job(job, name)  # before any cluster is looked for
    run_id = OrchestratorClient(address).submit(job, name=name, timeout_s=timeout, on_wait=tell_wait)
    say(f"Run {run_id} is submitted. Follow it with `orchestrator logs {run_id} -f`.")
    show(run_id)


def list_runs(address: Address = None, output: Output = Format.TEXT) -> None:
    """List the cluster's runs, the newest last."""
    from orchestrator.client import OrchestratorClient
    from orchestrator.protocol.codec import to_plain

    found = OrchestratorClient(address).list()
    if output is Format.JSON:
        show_json([to_plain(status) for status in found])
        return
    header = ("RUN", "PHASE", "STEP", "LOSS", "WORKERS", "SUBMITTED")
    rows = [
        (s.run_id, s.phase, f"{s.step}/{s.steps}", number(s.loss), str(s.workers_now or NONE), moment(s.submitted_time))
        for s in found
    ]
    show_table(header, rows)


def status(run: RunId, storage: Storage = None, address: Address = None, output: Output = Format.TEXT) -> None:
    """Show where a run is, or how it ended."""
    from orchestrator.cli.locate import find_run
    from orchestrator.cli.summary import aligned, details
    from orchestrator.protocol.codec import to_plain

    found = find_run(run, storage, address).status()
    if output is Format.JSON:
        show_json(to_plain(found))
    else:
        show(aligned(details(found)))


def scale(
    run: RunId,
    workers: Annotated[int, typer.Option("--workers", "-n", min=1, help="How many workers the run shall have.")],
    address: Address = None,
) -> None:
    """Change the number of a run's workers, within its job's min..max. No step is lost."""
    from orchestrator.client import OrchestratorClient

    client = OrchestratorClient(address)
    client.scale(run, workers)
    asked = counted(workers, "worker")
    if client.status(run).workers_now == workers:
        say(f"Run {run} has {asked} and goes on with them.")
    else:
        say(f"Run {run} will go on with {asked} as soon as they are ready.")


def cancel(run: RunId, address: Address = None) -> None:
    """End a run early. If it has trained, it writes a checkpoint first."""
    from orchestrator.client import OrchestratorClient

    OrchestratorClient(address).cancel(run)
    say(f"Run {run} ends after its current step, with a checkpoint if it has trained.")


def pause(run: RunId, address: Address = None) -> None:
    """Write a checkpoint and free a run's resources; `resume` lets it go on."""
    from orchestrator.client import OrchestratorClient

    OrchestratorClient(address).pause(run)
    say(f"Run {run} pauses after its current step. `orchestrator resume {run}` lets it go on.")


def resume(
    run: RunId,
    from_step: Annotated[
        int | None,
        typer.Option("--from", min=0, metavar="STEP", help="Go on from the checkpoint of this step. Default: newest."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", "-n", min=1, help="How many workers. Default: as many as were wanted last."),
    ] = None,
    storage: Annotated[
        Path | None,
        typer.Option("--storage", metavar="DIR", help="Run storage with the run, if this cluster has never seen it."),
    ] = None,
    timeout: Timeout = 0.0,
    address: Address = None,
) -> None:
    """Let a run go on from a checkpoint: after its end, or in a new cluster. It keeps its name and its MLflow run."""
    from orchestrator.client import OrchestratorClient

    client = OrchestratorClient(address)
    client.resume(run, storage=storage, from_step=from_step, workers=workers, timeout_s=timeout, on_wait=tell_wait)
    say(f"Run {run} goes on. Follow it with `orchestrator logs {run} -f`.")
    show(run)


def register(app: typer.Typer) -> None:
    for name, command in (("submit", submit), ("list", list_runs), ("status", status), ("scale", scale)):
        app.command(name, rich_help_panel="Runs")(command)
    app.command("cancel", rich_help_panel="Runs")(cancel)
    app.command("pause", rich_help_panel="Runs")(pause)
    app.command("resume", rich_help_panel="Runs")(resume)
