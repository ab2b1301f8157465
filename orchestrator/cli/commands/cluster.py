"""`cluster up | status | down`: a Ray cluster on this machine."""

import os
from typing import Annotated

import typer

from orchestrator.cli.terminal.options import GROUPS, Output
from orchestrator.cli.terminal.output import Format, narrate, show, show_answer, show_json
from orchestrator.errors import ClusterUnreachable, UsageError
from orchestrator.protocol.codec import to_plain

app = typer.Typer(no_args_is_help=True, help="A Ray cluster on this machine: loopback only, with a token.")


@app.command()
def up(
    cpus: Annotated[
        int | None,
        typer.Option(
            "--cpus",
            min=1,
            help="Logical CPUs, which may be more than there are: each worker and standby reserves resources.cpus. "
            "Default: 8, or the machine's if it has more.",
        ),
    ] = None,
    jobs_port: Annotated[
        int | None,
        typer.Option("--jobs-port", min=1, max=65535, help="Serve Ray's Jobs API and dashboard too, on loopback."),
    ] = None,
    output: Output = Format.TEXT,
) -> None:
    """Start the local cluster, unless it is up. It outlives this terminal."""
    from orchestrator.cluster import local

    started = local.up(cpus or default_cpus(), jobs_port)
    record = started.record
    if started.fresh:
        narrate(f"The local cluster is up: {record.num_cpus} logical CPUs. End it with `orchestrator cluster down`.")
    else:
        narrate(f"The local cluster is already up, with {record.num_cpus} logical CPUs. Nothing was changed.")
    show_answer(output, record, record.address)


@app.command()
def status(output: Output = Format.TEXT) -> None:
    """Show whether the local cluster is up, and where. Exits 69 if it isn't."""
    from orchestrator.cli.terminal.format import moment
    from orchestrator.cluster import local
    from orchestrator.cluster.processes import is_running

    record = local.status()
    if record is None:
        raise ClusterUnreachable("no local cluster is up", remedy="Start one with `orchestrator cluster up`.")
    if output is Format.JSON:
        show_json(to_plain(record))
        return
    running = sum(is_running(process) for process in record.processes)
    show(f"address    {record.address}")
    show(f"cpus       {record.num_cpus} logical")
    show(f"since      {moment(record.started_time)}")
    show(f"processes  {running} of {len(record.processes)} that it began with, head {record.head.pid}")
    show(f"metrics    http://{record.metrics_address}/metrics")
    show(f"files      {record.temp_dir}")
    show(f"log        {record.log_path}")


@app.command()
def down(
    force: Annotated[bool, typer.Option("--force", help="Also if runs are active; they end at once.")] = False,
) -> None:
    """End the local cluster and all its processes."""
    from orchestrator.cluster import local

    record = local.status()
    if record is None:
        narrate("No local cluster is up. Nothing was changed.")
        return
    try:
        active = [] if force else active_runs(record.address)
    except ClusterUnreachable as error:
        raise ClusterUnreachable(
            f"the local cluster can't list its runs: {error.message}",
            remedy="Try again in a moment, or pass --force to end it anyway.",
            unchanged="Nothing was changed.",
        ) from error
    if active:
        raise UsageError(
            f"runs are active in the local cluster: {', '.join(active)}",
            remedy="Wait for them, end them with `orchestrator stop RUN`, or pass --force.",
            unchanged="Nothing was changed.",
        )
    local.down()
    narrate("The local cluster is down.")


def default_cpus() -> int:
    return max(8, os.cpu_count() or 1)


def active_runs(address: str) -> list[str]:
    """Names of runs that have not ended. Raises ClusterUnreachable if the cluster can't list them."""
    from orchestrator.client import OrchestratorClient

    return [status.run_id for status in OrchestratorClient(address).list() if not status.phase.ended]


def register(main: typer.Typer) -> None:
    main.add_typer(app, name="cluster", rich_help_panel=GROUPS)
