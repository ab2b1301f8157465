"""Arguments and options that several commands share."""

import re
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.terminal.output import Format
from orchestrator.errors import UsageError

BEGIN, RUNS, STEER, GROUPS = "Begin", "Runs", "Steer a run", "More commands"  # panels of --help, in this order

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
    typer.Option("-w", "--workers", metavar="N|MIN..MAX", help="The same as --set workers=…", show_default=False),
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
    str | None,
    typer.Option(
        "--storage",
        metavar="DIR|URL",
        help="Read run storage in this directory or bucket; needs no cluster. Default: ask the cluster; without one, "
        "./runs.",
    ),
]
Output = Annotated[Format, typer.Option("-o", "--output", help="Format of the output.")]
Watch = Annotated[bool, typer.Option("--watch", help="Show updates until the end; with -o json a line per change.")]
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
Step = Annotated[
    int | None,
    typer.Option(
        "--step", min=0, metavar="STEP", help="The checkpoint of this step. Default: the newest.", show_default=False
    ),
]
KeyFile = Annotated[
    Path | None,
    typer.Option(
        "--key-file",
        metavar="FILE",
        help="The key with which the run's records are signed. Default: the one that this cluster or "
        "$ORCHESTRATOR_HOME/keys has.",
        show_default=False,
    ),
]
Yes = Annotated[bool, typer.Option("--yes", help="Don't ask.")]
Follow = Annotated[bool, typer.Option("-f", "--follow", help="Go on until the run has ended.")]
Tail = Annotated[int | None, typer.Option("--tail", min=0, metavar="N", help="Only the N newest so far.")]
Since = Annotated[
    str | None,
    typer.Option(
        "--since", metavar="TIME", help="Only from this time on: 90s, 10m, 2h, 1d ago, or 2026-11-24 16:17 (local)."
    ),
]

_AGO = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def since_s(text: str | None) -> float:
    """The `time.time()` that --since names; 0 without it. Raises UsageError."""
    if text is None:
        return 0.0
    if (ago := _AGO.fullmatch(text)) is not None:
        return time.time() - float(ago[1]) * _SECONDS[ago[2]]
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise UsageError(
            f"--since is {text!r}; it must be an age like 10m or a time like 2026-11-24 16:17",
            unchanged="Nothing was changed.",
        ) from None


def confirm(question: str, yes: bool) -> None:
    """Ask on the terminal unless `yes`. Raises UsageError after a no, or where no terminal can answer."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError(
            f"{question} There is no terminal to answer", remedy="Pass --yes if so.", unchanged="Nothing was changed."
        )
    if not typer.confirm(question, err=True):
        raise UsageError("not confirmed", unchanged="Nothing was changed.")
