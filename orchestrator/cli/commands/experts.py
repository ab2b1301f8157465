"""`experts rebalance`: the experts of a run."""

import time
from typing import Annotated

import typer

from orchestrator.cli.terminal.answers import PlacedExperts
from orchestrator.cli.terminal.format import counted
from orchestrator.cli.terminal.options import GROUPS, Address, Output, RunId
from orchestrator.cli.terminal.output import Format, narrate, show_answer
from orchestrator.errors import NotFinished

LOOK_EVERY_S = 0.2

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
    newest = max((event["seq"] for event in client.events(run)), default=-1)
    client.rebalance(run)
    deadline_s = time.monotonic() + timeout
    while True:
        for event in client.events(run, after=newest):
            newest = event["seq"]
            if event["kind"] == "experts_rebalanced":
                moved, before, after = event["num_moved"], 1 + event["before"], 1 + event["after"]
                to = f"the busiest worker gets {after:.2f} times the mean load, where it had {before:.2f}"
                narrate(f"Workers of run {run} got {counted(moved, 'expert')} after step {event['step']}: {to}.")
                show_answer(output, PlacedExperts(run, event["step"], moved, event["before"], event["after"]))
                return
            if event["kind"] == "experts_kept":
                narrate(f"The experts of run {run} stay where they are: {event['why']}.")
                held = event["rank_violation"]
                show_answer(output, PlacedExperts(run, event["step"], 0, held, held))
                return
        if time.monotonic() > deadline_s or client.get(run).phase.ended:
            raise NotFinished(
                f"the experts of run {run} are not placed yet",
                remedy=f"`orchestrator events {run}` shows when they are.",
            )
        time.sleep(LOOK_EVERY_S)


def register(main: typer.Typer) -> None:
    main.add_typer(app, name="experts", rich_help_panel=GROUPS)
