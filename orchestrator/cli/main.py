"""The command `orchestrator`: its subcommands, and the exit codes of errors.

0 ok; 2 bad usage or job file; 69 no cluster; 70 a bug; 77 not allowed; 100 the run failed; 101 it hasn't finished;
102 no such run; 103 it was cancelled. A command is imported when it is called (`cli/lazy.py`).
"""

import os
import sys
import traceback
from typing import Annotated

import typer

from orchestrator.cli.lazy import LazyGroup
from orchestrator.cluster.jobs_api import MARKED, is_url
from orchestrator.errors import OrchestratorError

INTERNAL_ERROR = 70
INTERRUPTED = 130  # as shells report a command that Ctrl-C ended


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Elastic training of mixture-of-experts language models on Ray: change the number of workers at any step.",
    epilog="A first run on this machine: orchestrator demo",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"orchestrator {version('elastic-orchestrator')}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the command itself."""


def _in_cluster(arguments: list[str]) -> int | None:
    """Run a command in the cluster if it names one by URL. Returns its exit code; None for a command to run here."""
    if MARKED not in os.environ and not any(map(is_url, (*arguments, os.environ.get("RAY_ADDRESS")))):
        return None
    from orchestrator.cli.commands import remote

    remote.mark_stderr()
    return remote.forwarded(arguments)


def main() -> None:
    """Run the command line; ends the process with the exit code."""
    try:
        code = _in_cluster(sys.argv[1:])
        if code is not None:
            sys.exit(code)
        app()
    except OrchestratorError as error:
        from orchestrator.cli.terminal.output import show_error

        show_error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception:
        traceback.print_exc()
        sys.exit(INTERNAL_ERROR)
    finally:
        if "ray" in sys.modules:
            from orchestrator.cluster.connection import disconnect

            disconnect()  # at the interpreter's exit Ray would sleep half a second before it


if __name__ == "__main__":
    main()
