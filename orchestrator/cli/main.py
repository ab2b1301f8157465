"""The command `orchestrator`: its verbs, and its end by an error or a signal (`orchestrator.cli.terminal.exit_codes`).

A command is imported when it is called (`orchestrator.cli.lazy`).
"""

import os
import sys
import traceback
from typing import Annotated

import typer

from orchestrator.cli.lazy import LazyGroup
from orchestrator.cli.retired import refuse_retired
from orchestrator.cli.terminal import signals
from orchestrator.cli.terminal.command_process import in_child
from orchestrator.cli.terminal.exit_codes import BUG
from orchestrator.cluster.jobs_api import MARKED, is_url
from orchestrator.errors import OrchestratorError

INTERRUPTED = 130  # exit code of typer after a KeyboardInterrupt, whichever signal raised it

app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="A first run on this machine: orchestrator demo",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"orchestrator {version('elastic-orchestrator')}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Elastic training of mixture-of-experts language models on Ray: change the number of workers at any step."""


def _in_cluster(arguments: list[str]) -> int | None:
    """Run a command in the cluster if it names one by URL. Returns its exit code; None for a command to run here."""
    if MARKED not in os.environ and not any(map(is_url, (*arguments, os.environ.get("RAY_ADDRESS")))):
        return None
    from orchestrator.cli.commands import remote

    remote.mark_stderr()
    return remote.forwarded(arguments)


def main() -> None:
    """Run the command line; ends the process with the exit code."""
    signals.install()
    try:
        refuse_retired(sys.argv[1:])
        code = _in_cluster(sys.argv[1:])
        if code is not None:
            sys.exit(code)
        app()
    except OrchestratorError as error:
        from orchestrator.cli.terminal.output import show_error

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
    finally:
        if "ray" in sys.modules:
            from orchestrator.cluster.connection import disconnect

            disconnect()  # at the interpreter's exit Ray would sleep half a second before it


def command() -> None:
    """Run the command line in a child process, which a signal can end during any system call. `top`, which reads no run
    storage itself, runs in this process, on its terminal."""
    if sys.argv[1:2] == ["top"]:
        main()
    in_child(main)


if __name__ == "__main__":
    command()
