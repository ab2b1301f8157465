"""`experts rebalance`: the experts of a run."""

import time
from typing import Annotated, Any

import typer

from orchestrator.cli.terminal.answers import PlacedExperts
from orchestrator.cli.terminal.format import counted
from orchestrator.cli.terminal.options import GROUPS, Address, Output, RunId
from orchestrator.cli.terminal.output import Format, narrate, show_answer
from orchestrator.errors import NotFinished

LOOK_EVERY_S = 0.2
REBALANCED, KEPT = "experts_rebalanced", "experts_kept"  # kinds of events

app = typer.Typer(no_args_is_help=True, help="The experts of a run.")


@app.command()
def rebalance(
    run: RunId,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0, metavar="SECONDS", help="How long to wait until they are placed.")
    ] = 60.0,
    address: Address = None,
    output: Output = Format.TEXT,
) -> None:
    """Place a run's experts on its workers by the tokens that they got lately, and wait for it. No step is lost. Exits
    101 if it takes longer."""
    from orchestrator.client import OrchestratorClient

    client = OrchestratorClient(address)
    request, newest = client.rebalance(run).rebalances, -1
    deadline_s = time.monotonic() + timeout
    while True:
        ended = client.get(run).phase.ended  # asked first, to read all events before the end
        for event in client.events(run, after=newest):
            newest = event["seq"]
            if event.get("request", 0) >= request and event["kind"] in (REBALANCED, KEPT):
                _show(run, event, output)
                return
        if ended or time.monotonic() > deadline_s:
            when = "it has ended" if ended else f"`orchestrator events {run}` shows when they are"
            raise NotFinished(f"the experts of run {run} were not placed by load", remedy=f"{when}.".capitalize())
        time.sleep(LOOK_EVERY_S)


def _show(run: str, event: dict[str, Any], output: Format) -> None:
    """The answer to a request, by its event."""
    if event["kind"] == KEPT:
        held = event["rank_violation"]
        narrate(f"The experts of run {run} stay where they are: {event['why']}.")
        show_answer(output, PlacedExperts(run, event["step"], 0, held, held))
        return
    moved, before, after = event["num_moved"], 1 + event["before"], 1 + event["after"]
    to = f"the busiest worker gets {after:.2f} times the mean load, where it had {before:.2f}"
    narrate(f"Workers of run {run} got {counted(moved, 'expert')} after step {event['step']}: {to}.")
    show_answer(output, PlacedExperts(run, event["step"], moved, event["before"], event["after"]))


def register(main: typer.Typer) -> None:
    main.add_typer(app, name="experts", rich_help_panel=GROUPS)
