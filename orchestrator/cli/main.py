"""The command `orchestrator`: its subcommands, and the exit codes of errors.

0 ok; 2 bad usage or job file; 69 no cluster; 70 a bug; 77 not allowed; 100 the run failed; 101 it hasn't finished;
102 no such run; 103 it was cancelled. Ray and other slow modules are imported by the commands that need them.
"""

import os
import sys
import traceback

import typer

from orchestrator.cli.commands import (
    checkpoints,
    cluster,
    data,
    doctor,
    export,
    inference,
    job_file,
    logs,
    plan,
    remote,
    report,
    run,
    runs,
    top,
    tracking,
    verify,
)
from orchestrator.cli.terminal.output import show_error
from orchestrator.errors import OrchestratorError

INTERNAL_ERROR = 70
INTERRUPTED = 130  # as shells report a command that Ctrl-C ended

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Elastic training of mixture-of-experts language models on Ray: change the number of workers at any step.",
    epilog="A first run on this machine: orchestrator run jobs/quickstart.yaml",
)
run.register(app)
runs.register(app)
top.register(app)
logs.register(app)
verify.register(app)
report.register(app)
checkpoints.register(app)
tracking.register(app)
export.register(app)
inference.register(app)
doctor.register(app)
job_file.register(app)
plan.register(app)
remote.register(app)
app.add_typer(data.app, name="data", rich_help_panel="Job files")
app.add_typer(cluster.app, name="cluster", rich_help_panel="Cluster")


def main() -> None:
    """Run the command line; ends the process with the exit code."""
    remote.mark_stderr()
    try:
        code = remote.forwarded(sys.argv[1:])
        if code is not None:
            sys.exit(code)
        app()
    except OrchestratorError as error:
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


if __name__ == "__main__":
    main()
