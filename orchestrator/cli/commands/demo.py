"""`demo`: a small run on this machine with two rescales and a killed worker, from nothing but the installed package."""

import json
from datetime import datetime
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.commands.run import run_here
from orchestrator.cli.terminal.options import BEGIN, Name, Output
from orchestrator.cli.terminal.output import Format

JOB = files("orchestrator.cli").joinpath("quickstart.yaml")  # equal to jobs/quickstart.yaml
NAME = "quickstart"
KILL_AT = 90  # between the two rescales that the job schedules


def demo(
    name: Name = None,
    storage: Annotated[Path, typer.Option("--storage", metavar="DIR", help="Run storage.")] = Path("runs"),
    output: Output = Format.TEXT,
) -> None:
    """Train a small model on this machine: 2 workers, then 3, one of them is killed, then 2 again. Takes two minutes.

    The same as `orchestrator run` with the job file jobs/quickstart.yaml, --local and --kill-at 90, but Ctrl-C ends the
    run too, with the cluster that was started for it.
    """
    with as_file(JOB) as job:
        run_here(
            job,
            name or free_name(storage),
            [f"storage={json.dumps(str(storage.absolute()))}"],
            None,
            kill_at=KILL_AT,
            leaves_run=False,
            output=output,
        )


def free_name(storage: Path) -> str:
    """The job's name, with the time if the storage has a run of that name."""
    return f"{NAME}-{datetime.now():%m%d-%H%M%S}" if (storage / NAME).exists() else NAME


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel=BEGIN)(demo)
