"""`top`: a live screen of the cluster's runs, and of one of them, from which they can be steered."""

import sys
from typing import Annotated

import typer

from orchestrator.cli.terminal.options import RUNS, Address
from orchestrator.errors import UsageError


def top(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="Run to open. Default: the list of all.", show_default=False)
    ] = None,
    address: Address = None,
) -> None:
    """Watch and steer the cluster's runs on a live screen: arrows and enter choose, + - p s steer, q quits."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError(
            "top needs a terminal as its input and output",
            remedy="`orchestrator status RUN -o json`, or `orchestrator ls -o json`, has the same for programs; "
            "--watch repeats it.",
            unchanged="Nothing was changed.",
        )
    from orchestrator.cli.top.client_process import ClusterLink
    from orchestrator.cli.top.look import Look

    link = ClusterLink(address)
    try:
        statuses = link.begin(run)  # an error at the start ends the command, as in any other
        from orchestrator.cli.top.screen import TopApp  # Textual, once there is something to show

        TopApp(link, Look(link.address, statuses, link.is_joining), run).run()
    finally:
        link.close()


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel=RUNS)(top)
