"""The command `orchestrator`: its verbs, and its end by an error or a signal (`orchestrator.cli.exit_codes`).

Ray and other slow modules are imported by the commands that need them.
"""

import os
import sys
import traceback
from importlib.metadata import version
from typing import Annotated

import typer

from orchestrator.cli.commands import (
    begin,
    check,
    checkpoint,
    cluster,
    data,
    job,
    model,
    records,
    remote,
    run,
    runs,
    steer,
    top,
    tracking,
)
from orchestrator.cli.exit_codes import BUG
from orchestrator.cli.retired import refuse_retired
from orchestrator.cli.terminal import signals
from orchestrator.cli.terminal.options import GROUPS
from orchestrator.cli.terminal.output import show, show_error
from orchestrator.errors import OrchestratorError

INTERRUPTED = 130  # exit code of typer after a KeyboardInterrupt, whichever signal raised it

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="A first run on this machine: orchestrator init, then orchestrator run job.yaml",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        show(f"orchestrator {version('elastic-orchestrator')}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Elastic training of mixture-of-experts language models on Ray: change the number of workers at any step."""


begin.register(app)
run.register(app)
runs.register(app)
records.register(app)
top.register(app)
steer.register(app)
for name, group in (
    ("job", job.app),
    ("checkpoint", checkpoint.app),
    ("model", model.app),
    ("data", data.app),
    ("check", check.app),
    ("fault", steer.fault),
    ("curriculum", steer.curriculum),
    ("tracking", tracking.app),
    ("cluster", cluster.app),
):
    app.add_typer(group, name=name, rich_help_panel=GROUPS)
remote.register(app)


def main() -> None:
    """Run the command line; ends the process with the exit code."""
    signals.install()
    remote.mark_stderr()
    try:
        refuse_retired(sys.argv[1:])
        code = remote.forwarded(sys.argv[1:])
        if code is not None:
            sys.exit(code)
        app()
    except OrchestratorError as error:
        show_error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(signals.exit_code())
    except SystemExit as end:
        sys.exit(signals.exit_code() if end.code == INTERRUPTED else end.code)
    except BrokenPipeError:  # the reader of our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception:
        traceback.print_exc()
        sys.exit(BUG)


if __name__ == "__main__":
    main()
