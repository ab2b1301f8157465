"""`check data | replay`: prove that a run used every sample once, and that its steps reproduce bit by bit."""

import time
from typing import Annotated

import typer

from orchestrator.cli.terminal.answers import ReplayedSteps
from orchestrator.cli.terminal.exit_codes import CHECK_FAILED
from orchestrator.cli.terminal.format import counted
from orchestrator.cli.terminal.options import GROUPS, Address, Output, RunId, Storage
from orchestrator.cli.terminal.output import Format, narrate, show, show_json
from orchestrator.policy.replay_check import Difference
from orchestrator.protocol.codec import to_plain
from orchestrator.protocol.events.notices import StateDiffers

REMARK_EVERY_S = 5.0

app = typer.Typer(no_args_is_help=True, help="Proofs of a run's results. Exit with 3 if one fails.")


@app.command("data")
def check_data(run: RunId, storage: Storage = None, address: Address = None, output: Output = Format.TEXT) -> None:
    """Prove from a run's ledger that each sample was used exactly once, in order. Exits 3 if not."""
    from orchestrator.cli.terminal.run_lookup import find_run

    result = find_run(run, storage, address).files.audit()
    if output is Format.JSON:
        show_json(to_plain(result))
    else:
        for problem in result.problems:
            show(problem)
        verdict = "each exactly once, in order" if result.ok else f"{len(result.problems)} problems"
        show(f"{result.steps} committed steps consumed {result.positions} sample positions: {verdict}")
        if result.left_out:
            steps = ", ".join(str(step) for step in result.left_out)
            show(f"not trained on, since they had made the loss explode: the batches of steps {steps}")
    if not result.ok:
        raise typer.Exit(CHECK_FAILED)


@app.command()
def replay(
    run: RunId,
    after: Annotated[
        int | None,
        typer.Option(
            "--step",
            min=-1,
            metavar="STEP",
            help="Begin after the checkpoint of this step; -1: at the run's beginning. Default: after the newest one "
            "that has steps after it.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, metavar="N", help="Number of steps, at most.")] = 20,
    workers: Annotated[
        int | None,
        typer.Option("-w", "--workers", min=1, help="Number of workers. Default: another than the run's."),
    ] = None,
    storage: Storage = None,
    address: Address = None,
    output: Output = Format.TEXT,
) -> None:
    """Replay steps of a run here with another number of workers and compare every bit. Exits 3 if one differs.

    For runs with train.determinism exact. Nothing of the run changes, and it may be active meanwhile.
    """
    from orchestrator.cli.terminal.run_lookup import find_run
    from orchestrator.policy.replay_check import differences, doubt, first_difference, state_differs
    from orchestrator.protocol.child_process import Numerics
    from orchestrator.protocol.replay_task import StepFingerprint
    from orchestrator.submission.replay_processes import done_again
    from orchestrator.submission.verification import numerics_here, what_to_verify

    order = what_to_verify(run, find_run(run, storage, address).files.run_dir, after, steps, workers)
    first, last = order.records[0].step, order.records[-1].step
    began = order.checkpoint.name if order.checkpoint is not None else "the beginning"
    done_by = ", then ".join(str(past.world.size) for past in order.worlds)
    narrate(
        f"Steps {first} to {last} of run {run}, done by {done_by} workers, again with {order.workers}, from {began}."
    )
    recorded = [StepFingerprint.of(record) for record in order.records]
    again, elsewhere, remarked_s = [], {}, time.monotonic()
    difference: Difference | None = None
    for answer in done_again(order):
        if isinstance(answer, Numerics):
            elsewhere = differences(order.numerics or {}, numerics_here(answer)) if order.numerics else {}
            continue
        again.append(answer)
        if time.monotonic() - remarked_s > REMARK_EVERY_S:
            narrate(f"{len(again)} of {counted(len(order.records), 'step')}")
            remarked_s = time.monotonic()
        if (difference := first_difference(recorded, [StepFingerprint.of(answer)])) is not None:
            break
    members = list(dict.fromkeys(worker for past in order.worlds for worker in past.world.members))
    if warning := doubt(members, order.differing, elsewhere):
        narrate(warning)
    where = state_differs(difference, order.worlds, {}) if difference is not None else None
    if output is Format.JSON:
        first, last = order.records[0].step, again[-1].step
        equal, workers_differ = where is None, {worker: dict(found) for worker, found in order.differing.items()}
        show_json(
            to_plain(ReplayedSteps(run, first, last, order.workers, equal, where, dict(elsewhere), workers_differ))
        )
    elif difference is None:
        what = "losses, norms and states" if all(finding.digests for finding in recorded) else "losses and norms"
        show(f"{counted(len(again), 'step')}: {what} are the same, bit for bit.")
    else:
        show(_told(difference, where))
    if difference is not None:
        raise typer.Exit(CHECK_FAILED)


def _told(difference: Difference, where: StateDiffers | None) -> str:
    names = {"loss": "its loss", "grad_norm": "its gradients' norm", "state": "the state that it led to"}
    parts = ", ".join(names[part] for part in difference.parts)
    if where is not None and where.ranks:
        pairs = ", ".join(f"{rank} ({worker})" for rank, worker in zip(where.ranks, where.workers, strict=True))
        return f"Step {difference.step} differs: {parts}, of rank {pairs} only. Look at the memory of its node."
    return f"Step {difference.step} differs: {parts}. The rank that was wrong can't be determined."


def register(main: typer.Typer) -> None:
    main.add_typer(app, name="check", rich_help_panel=GROUPS)
