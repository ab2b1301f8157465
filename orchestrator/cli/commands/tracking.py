"""`tracking ui | sync`: serve MLflow's pages, and deliver what MLflow lacks."""

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.terminal.format import counted
from orchestrator.cli.terminal.options import GROUPS, Address, RunId, Storage
from orchestrator.cli.terminal.output import narrate, show
from orchestrator.errors import NotFinished, UsageError

app = typer.Typer(no_args_is_help=True, help="MLflow: its pages, and what it lacks.")


@app.command()
def ui(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="Run whose tracker to show. Default: run storage.")
    ] = None,
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 5000,
    host: Annotated[
        str, typer.Option("--host", help="Another than the default lets all who reach it read and change everything.")
    ] = "127.0.0.1",
    names: Annotated[
        list[str] | None,
        typer.Option("--allow-host", metavar="NAME", help="Another name by which browsers reach it, as by a proxy."),
    ] = None,
    storage: Annotated[
        str | None, typer.Option("--storage", metavar="DIR|URL", help="Run storage. Default: ./runs.")
    ] = None,
    uri: Annotated[str | None, typer.Option("--uri", metavar="URI", help="Any other MLflow database.")] = None,
    address: Address = None,
) -> None:
    """Serve MLflow's pages on this machine until Ctrl-C. Prints their address."""
    from orchestrator.cli.terminal.run_lookup import find_run
    from orchestrator.run_records.tracker_setup import database_directory, tracker_setup
    from orchestrator.storage.backends.location import location_of
    from orchestrator.tracking.mlflow_server import MlflowServer

    if run is not None and uri is None:
        files = find_run(run, storage, address).files
        place = database_directory(files.run_dir.parent)
        uri = tracker_setup(run, files.run_dir, files.job()).uri
    else:
        place = database_directory(location_of(storage or "runs"))
        uri = uri or _database_in(place)
    if uri.startswith("http"):
        narrate("A server has these runs already.")
        show(uri)
        return
    try:
        artifacts = str(place / "mlflow-artifacts")
        with MlflowServer(uri, host=host, port=port, artifacts=artifacts, names=names or ()) as server:
            show(server.url)
            narrate("Ctrl-C ends it.")
            server.wait()
    except KeyboardInterrupt:
        narrate("The pages are gone; nothing is left behind.")


def _database_in(place: Path) -> str:
    from orchestrator.run_records.tracker_setup import default_uri

    if not (place / "mlflow.db").exists():
        raise UsageError(
            f"{place} holds no mlflow.db",
            remedy="Name a run, its storage with --storage, or a database with --uri.",
            unchanged="Nothing was started.",
        )
    return default_uri(place)


@app.command()
def sync(
    run: RunId,
    timeout: Annotated[float, typer.Option("--timeout", min=1, metavar="SECONDS", help="How long to try.")] = 120.0,
    storage: Storage = None,
    address: Address = None,
) -> None:
    """Deliver what MLflow has not accepted of a run that has ended. Exits 101 if something remains."""
    from orchestrator.cli.terminal.run_lookup import find_run
    from orchestrator.run_records.tracker_setup import outbox_of
    from orchestrator.run_records.tracking_sync import deliver, waits_for_delivery

    run_dir = find_run(run, storage, address).files.run_dir
    waiting = waits_for_delivery(run_dir)
    narrate(f"{counted(waiting, 'item')} of run {run} waiting for MLflow; checking what else it lacks.")
    state = deliver(run_dir, timeout)
    if state["waiting"]:
        raise NotFinished(
            f"{state['waiting']} of them still wait: {state['error'] or 'there was not enough time'}",
            remedy=f"`orchestrator tracking sync {run}` tries again.",
            unchanged=f"What waits is kept in {outbox_of(run_dir)}.",
        )
    narrate("MLflow has everything.")
    show(state["url"])


def register(main: typer.Typer) -> None:
    main.add_typer(app, name="tracking", rich_help_panel=GROUPS)
