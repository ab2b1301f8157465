"""`verify`: replay steps of a run with another number of workers and compare them bit by bit."""

import time
from typing import Annotated

import typer

from orchestrator.cli.commands.inference import until_interrupted
from orchestrator.cli.terminal.format import counted
from orchestrator.cli.terminal.options import Address, Output, RunId, Storage
from orchestrator.cli.terminal.output import Format, say, show, show_json
from orchestrator.policy.replay_check import Difference
from orchestrator.protocol.codec import to_plain
from orchestrator.protocol.events.notices import StateDiffers

REMARK_EVERY_S = 5.0
DIFFER = 100


def verify(
    run: RunId,
    after: Annotated[
        int | None,
        typer.Option(
            "--from",
            min=-1,
            metavar="STEP",
            help="Begin after the checkpoint of this step; -1: at the run's beginning. Default: after the newest one "
            "that has steps after it.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, metavar="N", help="Number of steps, at most.")] = 20,
    workers: Annotated[
        int | None,
        typer.Option("--workers", "-n", min=1, help="Number of workers. Default: another than the run's."),
    ] = None,
    storage: Storage = None,
    address: Address = None,
    output: Output = Format.TEXT,
) -> None:
    """Replay steps of a run here with another number of workers and compare every bit. Exits 100 if one differs.

    For runs with train.determinism exact. Nothing of the run changes, and it may be active meanwhile.
    """
    from orchestrator.cli.terminal.run_lookup import find_run
    from orchestrator.policy.replay_check import differences, doubt, first_difference, state_differs
    from orchestrator.protocol.child_process import Numerics
    from orchestrator.submission.replay_processes import done_again
    from orchestrator.submission.verification import numerics_here, what_to_verify

    order = what_to_verify(run, find_run(run, storage, address).files.run_dir, after, steps, workers)
    first, last = order.records[0].step, order.records[-1].step
    began = order.checkpoint.name if order.checkpoint is not None else "the beginning"
    done_by = ", then ".join(str(past.world.size) for past in order.worlds)
    say(f"Steps {first} to {last} of run {run}, done by {done_by} workers, again with {order.workers}, from {began}.")
    again, elsewhere, remarked_s = [], {}, time.monotonic()
    difference: Difference | None = None
    with until_interrupted():
        for answer in done_again(order):
            if isinstance(answer, Numerics):
                elsewhere = differences(order.numerics or {}, numerics_here(answer)) if order.numerics else {}
                continue
            again.append(answer)
            if time.monotonic() - remarked_s > REMARK_EVERY_S:
                say(f"{len(again)} of {counted(len(order.records), 'step')}")
                remarked_s = time.monotonic()
            if (difference := first_difference(order.records, [answer])) is not None:
                break
    members = list(dict.fromkeys(worker for past in order.worlds for worker in past.world.members))
    if warning := doubt(members, order.differing, elsewhere):
        say(warning)
    where = state_differs(difference, order.worlds, {}) if difference is not None else None
    if output is Format.JSON:
        summary = {"run": run, "first_step": first, "last_step": again[-1].step, "workers": order.workers}
        show_json(
            summary
            | {
                "equal": where is None,
                "difference": None if where is None else to_plain(where),
                "numerics_differ": elsewhere,
                "workers_differ": order.differing,
            }
        )
    elif difference is None:
        what = "losses, norms and states" if all(record.digests for record in order.records) else "losses and norms"
        show(f"{counted(len(again), 'step')}: {what} are the same, bit for bit.")
    else:
        show(_told(difference, where))
    if difference is not None:
        raise typer.Exit(DIFFER)


def _told(difference: Difference, where: StateDiffers | None) -> str:
    names = {"loss": "its loss", "grad_norm": "its gradients' norm", "state": "the state that it led to"}
    parts = ", ".join(names[part] for part in difference.parts)
    if where is not None and where.ranks:
        pairs = ", ".join(f"{rank} ({worker})" for rank, worker in zip(where.ranks, where.workers, strict=True))
        return f"Step {difference.step} differs: {parts}, of rank {pairs} only. Look at the memory of its node."
    return f"Step {difference.step} differs: {parts}. The rank that was wrong can't be determined."


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Records")(verify)
