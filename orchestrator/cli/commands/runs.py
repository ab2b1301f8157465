"""`submit`, `list`, `status`, `scale`, `cancel` and other commands that steer runs."""

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.commands.remote import submit_by_url
from orchestrator.cli.terminal.format import NONE, counted, moment, number
from orchestrator.cli.terminal.options import (
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
from orchestrator.cli.terminal.output import Format, say, show, show_json, show_line, show_table, tell_wait
from orchestrator.cluster.jobs_api import is_url
from orchestrator.errors import UsageError
from orchestrator.protocol.codec import to_plain
from orchestrator.protocol.messages import DesiredRunState


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
        run_id, _ = submit_by_url(str(address), job, name, overrides, dry_run)
        _show_name(run_id, output)
        return
    spec = check_job(job, name, overrides)  # before connecting to a cluster
    client = OrchestratorClient(address)
    if dry_run:
        say(
            f"Run {spec.name} would be submitted to {client.address} and stored in {spec.storage}. Nothing was started."
        )
        _show_name(spec.name, output)
        return
    run_id = client.submit(job, name=name, overrides=overrides, timeout_s=timeout, on_wait=tell_wait)
    say(f"Run {run_id} is submitted. Follow it with `orchestrator logs {run_id} -f`.")
    _show_name(run_id, output)


def list_runs(watch: Watch = False, address: Address = None, output: Output = Format.TEXT) -> None:
    """List the cluster's runs, the newest last. Watching ends when all have ended."""
    from orchestrator.cli.terminal.progress import watch_runs
    from orchestrator.client import OrchestratorClient

    client = OrchestratorClient(address)
    if watch:
        watch_runs(client.list, (lambda s: show_line(to_plain(s))) if output is Format.JSON else None)
        if output is Format.JSON:
            return
    found = client.list()
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
    from orchestrator.cli.terminal.progress import watch_runs
    from orchestrator.cli.terminal.run_lookup import find_run
    from orchestrator.cli.terminal.summary import aligned, details

    place = find_run(run, storage, address)
    if watch:
        on_change = (lambda s: show_line(to_plain(s))) if output is Format.JSON else None
        watch_runs(lambda: (place.status(),), on_change, place.is_over)
        if output is Format.JSON:
            return
    found = place.status()
    if output is Format.JSON:
        show_json(to_plain(found))
        return
    if found.traceback:
        show(found.traceback.rstrip())
    show(aligned(details(found)))


def scale(
    run: RunId,
    workers: Annotated[
        str,
        typer.Option("--workers", "-n", metavar="N|auto", help="Number of workers; auto: the job's autoscale decides."),
    ],
    address: Address = None,
    output: Output = Format.TEXT,
) -> None:
    """Change the number of a run's workers, within its job's min..max. No step is lost."""
    from orchestrator.client import OrchestratorClient

    size = _size(workers)
    client = OrchestratorClient(address)
    target = client.scale(run, size)
    if size is None:
        say(f"The job's autoscale decides the number of workers of run {run} from now on.")
        _show_target(run, target, output)
        return
    asked = counted(size, "worker")
    if client.get(run).workers_now == size:
        say(f"Run {run} has {asked} and goes on with them.")
    else:
        say(f"Run {run} will go on with {asked} as soon as they are ready.")
    _show_target(run, target, output)


def stage(
    run: RunId,
    name: Annotated[str, typer.Argument(metavar="next|NAME", help="The next stage, or one of the job's by name.")],
    address: Address = None,
    output: Output = Format.TEXT,
) -> None:
    """Switch a run to another stage of its curriculum. `events` shows the step at which it begins."""
    from orchestrator.client import OrchestratorClient

    target = OrchestratorClient(address).stage(run, name)
    which = "the next stage" if name == "next" else f"stage {name}"
    say(f"Run {run} will go on to {which} in some steps, on all workers at the same one.")
    _show_target(run, target, output)


def kill(
    run: RunId,
    rank: Annotated[int | None, typer.Option("--rank", min=0, help="Rank to kill. Default: the highest.")] = None,
    address: Address = None,
    output: Output = Format.TEXT,
) -> None:
    """Kill one worker's process, as a fault would, to test recovery. `status` shows what it cost."""
    from orchestrator.client import OrchestratorClient

    worker = OrchestratorClient(address).kill_worker(run, rank)
    say(f"Worker {worker} of run {run} is killed. `orchestrator events {run}` shows what follows.")
    if output is Format.JSON:
        show_json({"run_id": run, "worker": worker})


def stop(run: RunId, address: Address = None, output: Output = Format.TEXT) -> None:
    """End a run early. If it has trained, it writes a checkpoint first."""
    from orchestrator.client import OrchestratorClient

    target = OrchestratorClient(address).stop(run)
    say(f"Run {run} ends after its current step, with a checkpoint if it has trained.")
    _show_target(run, target, output)


def pause(run: RunId, address: Address = None, output: Output = Format.TEXT) -> None:
    """Write a checkpoint and free a run's resources; `resume` continues it."""
    from orchestrator.client import OrchestratorClient

    target = OrchestratorClient(address).pause(run)
    say(f"Run {run} pauses after its current step. `orchestrator resume {run}` lets it go on.")
    _show_target(run, target, output)


def resume(
    run: RunId,
    from_step: Annotated[
        int | None,
        typer.Option("--from", min=0, metavar="STEP", help="Resume from the checkpoint of this step. Default: newest."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", "-n", min=1, help="Number of workers. Default: the number requested last."),
    ] = None,
    reset_residuals: Annotated[
        bool, typer.Option("--reset-residuals", help="Discard gradients that compression has not sent yet.")
    ] = False,
    storage: Annotated[
        Path | None,
        typer.Option("--storage", metavar="DIR", help="Run storage with the run, if this cluster doesn't know it."),
    ] = None,
    timeout: Timeout = None,
    address: Address = None,
    output: Output = Format.TEXT,
) -> None:
    """Resume a run from a checkpoint: after its end, or in a new cluster. It keeps its name and its MLflow run."""
    from orchestrator.client import OrchestratorClient

    client = OrchestratorClient(address)
    client.resume(
        run,
        storage=storage,
        from_step=from_step,
        workers=workers,
        reset_residuals=reset_residuals,
        timeout_s=timeout,
        on_wait=tell_wait,
    )
    say(f"Run {run} goes on. Follow it with `orchestrator logs {run} -f`.")
    _show_name(run, output)


def _size(workers: str) -> int | None:
    if workers == "auto":
        return None
    if not workers.isdecimal() or int(workers) < 1:
        raise UsageError(
            f"--workers is {workers!r}; it must be a whole number from 1, or auto", unchanged="Nothing was changed."
        )
    return int(workers)


def _show_name(run_id: str, output: Format) -> None:
    if output is Format.JSON:
        show_json({"run_id": run_id})
    else:
        show(run_id)


def _show_target(run_id: str, target: DesiredRunState, output: Format) -> None:
    """Print the run's desired state for programs; users have read a message on stderr."""
    if output is Format.JSON:
        show_json({"run_id": run_id, **to_plain(target)})


def register(app: typer.Typer) -> None:
    for name, command in (("submit", submit), ("list", list_runs), ("status", status), ("scale", scale)):
        app.command(name, rich_help_panel="Runs")(command)
    app.command("stage", rich_help_panel="Runs")(stage)
    app.command("kill", rich_help_panel="Runs")(kill)
    app.command("stop", rich_help_panel="Runs")(stop)
    app.command("pause", rich_help_panel="Runs")(pause)
    app.command("resume", rich_help_panel="Runs")(resume)
