"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.terminal.output import Format

JobFile = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.", show_default=False)]
Name = Annotated[
    str | None,
    typer.Option("--name", metavar="NAME", help="The run's name. Default: the job's.", show_default=False),
]


Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the job file, like train.max_steps=200. May be given several times.",
        show_default=False,
    ),
]
Range = Annotated[
    str | None,
    typer.Option("--workers", metavar="N|MIN..MAX", help="The same as --set workers=…", show_default=False),
]


def overrides_of(settings: list[str] | None, workers: str | None) -> list[str]:
    """Overrides of a job file from --set and --workers."""
    return [*(settings or []), *([f"workers={workers}"] if workers is not None else [])]


def _known_runs(incomplete: str) -> list[str]:
    """Completions of RUN for shells: runs in ./runs."""
    from orchestrator.run_records.run_files import runs_in

    return [run for run in runs_in(Path("runs")) if run.startswith(incomplete)]


RunId = Annotated[
    str, typer.Argument(metavar="RUN", help="The run's name.", show_default=False, autocompletion=_known_runs)
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="HOST:PORT|URL",
        envvar="RAY_ADDRESS",
        help="Head of the Ray cluster, or the URL of its Jobs API, like http://10.0.0.5:8265. Default: the local one "
        "of `orchestrator cluster up`.",
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
Output = Annotated[Format, typer.Option("-o", "--output", help="Format of the output.")]
Watch = Annotated[
    bool, typer.Option("-w", "--watch", help="Show updates until the end; with -o json a line per change.")
]
Timeout = Annotated[
    float | None,
    typer.Option(
        "--timeout",
        min=0,
        metavar="SECONDS",
        help="Start nothing if the cluster has no room within this time. Default: wait in the queue.",
        show_default=False,
    ),
]
