"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.output import Format

JobFile = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.", show_default=False)]
Name = Annotated[
    str | None,
    typer.Option("--name", metavar="NAME", help="The run's name, in place of the job's.", show_default=False),
]


def _known_runs(incomplete: str) -> list[str]:
    """What a shell offers for RUN: runs in ./runs."""
    from orchestrator.control.run_files import runs_in

    return [run for run in runs_in(Path("runs")) if run.startswith(incomplete)]


RunId = Annotated[
    str, typer.Argument(metavar="RUN", help="The run's name.", show_default=False, autocompletion=_known_runs)
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="HOST:PORT",
        envvar="RAY_ADDRESS",
        help="Head of the Ray cluster. Default: the local one of `orchestrator cluster up`.",
    ),
]
Storage = Annotated[
    Path | None,
    typer.Option(
        "--storage",
        metavar="DIR",
        help="Read the run from here; needs no cluster. Default: ask the cluster; if none knows it, ./runs.",
    ),
]
Output = Annotated[Format, typer.Option("-o", "--output", help="How to write it.")]
Watch = Annotated[
    bool, typer.Option("-w", "--watch", help="Go on showing it until the end; with -o json a line per change.")
]
Timeout = Annotated[
    float,
    typer.Option(
        "--timeout", min=0, metavar="SECONDS", help="How long to wait for room in the cluster before giving up."
    ),
]
