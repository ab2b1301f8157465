"""`experts rebalance` and `experts set`: the experts of a run, their places and their number."""

import time
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer

from orchestrator.cli.terminal.answers import NumberedExperts, PlacedExperts
from orchestrator.cli.terminal.format import counted
from orchestrator.cli.terminal.options import GROUPS, Address, Output, RunId
from orchestrator.cli.terminal.output import Format, narrate, show_answer
from orchestrator.errors import NotFinished

LOOK_EVERY_S = 0.2
REBALANCED, KEPT = "experts_rebalanced", "experts_kept"  # kinds of events
CHANGED, UNCHANGED = "experts_changed", "experts_unchanged"

app = typer.Typer(no_args_is_help=True, help="The experts of a run.")
Timeout = Annotated[
    float, typer.Option("--timeout", min=0, metavar="SECONDS", help="How long to wait until they are there.")
]


class Keep(StrEnum):
    """Experts that stay where there are fewer."""

    REAP = "reap"
    LOAD = "load"
    RANDOM = "random"


@app.command()
def rebalance(run: RunId, timeout: Timeout = 60.0, address: Address = None, output: Output = Format.TEXT) -> None:
    """Place a run's experts on its workers by the tokens that they got lately, and wait for it. No step is lost. Exits
    101 if it takes longer."""
    from orchestrator.client import OrchestratorClient

    client = OrchestratorClient(address)
    request = client.rebalance(run).rebalances
    _show(run, _answer(client, run, request, (REBALANCED, KEPT), timeout, "were not placed by load"), output)


@app.command("set")
def set_number(
    run: RunId,
    num_experts: Annotated[int, typer.Argument(min=1, metavar="NUMBER", help="Routed experts of each MoE layer.")],
    keep: Annotated[
        Keep,
        typer.Option(
            "--keep", help="Of fewer, those that stay: that add most (experts.saliency), with most tokens, or drawn."
        ),
    ] = Keep.LOAD,
    noise: Annotated[
        float, typer.Option("--noise", min=0, max=1, help="Added to router rows of clones, over their own deviation.")
    ] = 0.0,
    reinit_ratio: Annotated[
        float, typer.Option("--reinit-ratio", min=0, max=1, help="Share of each clone that is drawn anew.")
    ] = 0.0,
    dissolve: Annotated[
        bool, typer.Option("--dissolve", help="Let tokens visit several clones of an expert from then on.")
    ] = False,
    timeout: Timeout = 60.0,
    address: Address = None,
    output: Output = Format.TEXT,
) -> None:
    """Give each MoE layer of a run another number of experts, and wait for it: a multiple of the present one, or fewer.
    No step is lost. Exits 101 if it takes longer."""
    from orchestrator.client import OrchestratorClient
    from orchestrator.protocol.messages import ExpertRequest

    client = OrchestratorClient(address)
    wanted = ExpertRequest(0, num_experts, keep.value, noise, reinit_ratio, dissolve)
    request = client.set_experts(run, wanted).experts.number
    event = _answer(client, run, request, (CHANGED, UNCHANGED), timeout, f"are not {num_experts} yet")
    if event["kind"] == UNCHANGED:
        narrate(f"Run {run} keeps its {event['num_experts']} experts per layer: {event['why']}.")
        show_answer(output, NumberedExperts(run, event["step"], event["num_experts"], event["num_experts"]))
        return
    before, after, step = event["before"], event["after"], event["step"]
    numbers = f"{after} experts per layer, it had {before}," if before != after else "no families of experts"
    narrate(f"Run {run} has {numbers} after step {step}.")
    show_answer(output, NumberedExperts(run, step, before, after))


def _answer(client: Any, run: str, request: int, kinds: Sequence[str], timeout: float, what: str) -> dict[str, Any]:
    """The event of one of these kinds that answers a request. Raises NotFinished."""
    newest, deadline_s = -1, time.monotonic() + timeout
    while True:
        ended = client.get(run).phase.ended  # asked first, to read all events before the end
        for event in client.events(run, after=newest):
            newest = event["seq"]
            if event.get("request", 0) >= request and event["kind"] in kinds:
                found: dict[str, Any] = event
                return found
        if ended or time.monotonic() > deadline_s:
            when = "it has ended" if ended else f"`orchestrator events {run}` shows when they are"
            raise NotFinished(f"the experts of run {run} {what}", remedy=f"{when}.".capitalize())
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
