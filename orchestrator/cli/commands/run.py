"""`run`: run a job in the foreground, in a cluster that it starts if there is none."""

import math
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.commands.remote import run_by_url, submit_by_url
from orchestrator.cli.commands.runs import show_name
from orchestrator.cli.terminal import signals
from orchestrator.cli.terminal.options import RUNS, Address, JobFile, Name, Output, Range, Set, Timeout, overrides_of
from orchestrator.cli.terminal.output import Format, narrate, narrate_wait, show_answer
from orchestrator.cluster.jobs_api import is_url
from orchestrator.errors import ClusterUnreachable, OrchestratorError, UsageError
from orchestrator.protocol.status import RunPhase, RunStatus
from orchestrator.spec.job import JobSpec


def run(
    job: JobFile,
    name: Name = None,
    settings: Set = None,
    workers: Range = None,
    timeout: Timeout = None,
    local: Annotated[bool, typer.Option("--local", help="On this machine, even if RAY_ADDRESS is set.")] = False,
    keep_cluster: Annotated[
        bool, typer.Option("--keep-cluster", help="Leave the local cluster up that this command started.")
    ] = False,
    kill_at: Annotated[
        int | None,
        typer.Option("--kill-at", min=1, metavar="STEP", help="Kill one worker's process after this many steps."),
    ] = None,
    detach: Annotated[
        bool,
        typer.Option(
            "-d",
            "--detach",
            help="Return once the run is submitted, and print its name; a cluster that was started for it stays up.",
        ),
    ] = False,
    address: Address = None,
    output: Output = Format.TEXT,
) -> None:
    """Run a job and watch it to its end.

    Without a cluster, one is started on this machine, and ended afterwards. Ctrl-C detaches: the run goes on.
    To the URL of a Jobs API it sends the current directory, and shows the run's log lines.
    """
    overrides = overrides_of(settings, workers)
    if is_url(address) and not local:
        if kill_at is not None:
            raise UsageError(
                "--kill-at needs the cluster itself, not the URL of its Jobs API",
                remedy="`orchestrator fault kill-worker RUN --address URL` kills a worker by hand.",
                unchanged="Nothing was started.",
            )
        if detach:
            run_id, _ = submit_by_url(str(address), job, name, overrides, timeout)
            show_name(run_id, output)
        else:
            run_by_url(str(address), job, name, overrides, timeout, output)
        return
    run_here(
        job,
        name,
        overrides,
        None if local else address,
        timeout=timeout,
        keep_cluster=keep_cluster,
        kill_at=kill_at,
        detach=detach,
        output=output,
    )


def run_here(
    job: Path,
    name: str | None,
    overrides: list[str],
    address: str | None,
    *,
    timeout: float | None = None,
    keep_cluster: bool = False,
    kill_at: int | None = None,
    detach: bool = False,
    leaves_run: bool = True,
    output: Format,
) -> None:
    """Run a job in the named cluster, or the local one, and watch it to its end.

    Args:
        leaves_run: the run goes on if a signal ends the command; else it ends with the cluster, if that was started
            for it.
    """
    from orchestrator.cli.terminal.progress import LiveProgress
    from orchestrator.cli.terminal.summary import aligned, summary
    from orchestrator.client import OrchestratorClient, check_job, raise_unless_succeeded

    spec = check_job(job, name, overrides)  # before connecting to a cluster or starting one
    with _cluster(spec, address, keep_cluster or detach, leaves_run) as place:
        client = OrchestratorClient(place.address)
        run_id = client.submit(job, name=name, overrides=overrides, timeout_s=timeout, on_wait=narrate_wait)
        ends_run = not leaves_run and not place.keep
        interrupt = "Ctrl-C ends it" if ends_run else "Ctrl-C detaches"
        narrate(f"Run {run_id} is submitted, its files are in {client.get(run_id).run_dir}. {interrupt}.")
        if detach:
            narrate(_detached(run_id))
            show_name(run_id, output)
            return
        live = LiveProgress()
        victims = [kill_at] if kill_at is not None else []

        def look(status: RunStatus) -> None:
            live.show(status)
            if victims and status.phase is RunPhase.TRAINING and status.step >= victims[0]:
                victims.clear()
                live.keep(f"{client.kill_worker(run_id)} of {run_id} is killed")

        try:
            status = client.wait(run_id, on_status=look)
        except KeyboardInterrupt:
            if ends_run:
                live.close()
                raise
            signals.ignore()  # a second Ctrl-C would only truncate the messages
            place.keep = True
            live.close()
            narrate(_detached(run_id))
            raise typer.Exit(101) from None
        except ClusterUnreachable as error:
            live.close()
            storage = shlex.quote(spec.storage)
            error.remedy = f"`orchestrator status {run_id} --storage {storage}` shows how far the run has come."
            raise
        live.close()
    show_answer(output, status, aligned(summary(status)))
    raise_unless_succeeded(status)


class _Place:
    """The run's cluster. `keep` leaves a cluster up that was started for it."""

    def __init__(self, address: str, keep: bool) -> None:
        self.address, self.keep = address, keep


@contextmanager
def _cluster(spec: JobSpec, address: str | None, keep: bool, leaves_run: bool) -> Iterator[_Place]:
    """The named cluster, or the local one, which is started if necessary and then ended again, with the job's run
    unless `leaves_run`."""
    if address is not None:
        yield _Place(address, keep=True)
        return
    from orchestrator.cli.commands.cluster import default_cpus
    from orchestrator.cluster import local

    started = local.up(max(default_cpus(), logical_cpus(spec)))
    place = _Place(started.record.address, keep or not started.fresh)
    try:
        if started.fresh:
            narrate(f"Started Ray on this machine ({started.record.num_cpus} logical CPUs).")
        yield place
    finally:
        if not place.keep:
            with signals.ignored():
                _end_cluster(place.address, None if leaves_run else spec.name)


def _end_cluster(address: str, ours: str | None) -> None:
    """End the cluster that was started, unless another run than `ours` is active there, or may be."""
    from orchestrator.cli.commands.cluster import active_runs
    from orchestrator.cluster import local
    from orchestrator.cluster.connection import disconnect

    if local.status() is None:
        narrate("The Ray that was started has ended.")
        return
    try:
        active = [run for run in active_runs(address) if run != ours]
    except OrchestratorError as error:
        narrate(f"The local cluster stays up: it can't list its runs: {error} End it with `orchestrator cluster down`.")
        return
    finally:
        disconnect()
    if active:
        narrate(f"The local cluster stays up for {', '.join(active)}.")
    else:
        local.down()
        narrate("Stopped the Ray that was started.")


def logical_cpus(spec: JobSpec) -> int:
    """CPUs reserved by as many workers as the job may have at once, standbys or one more for a rescale included."""
    return math.ceil(spec.resources.cpus * (spec.workers.max + max(1, spec.workers.standby)))


def _detached(run_id: str) -> str:
    return (
        f"Detached; run {run_id} continues. `orchestrator status {run_id}` shows where it is, "
        f"`orchestrator logs {run_id} -f` follows it, `orchestrator stop {run_id}` ends it; "
        "`orchestrator cluster down` stops Ray afterwards."
    )


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel=RUNS)(run)
