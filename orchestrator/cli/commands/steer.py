"""`scale`, `pause`, `resume`, `stop`, `rm`, `set`, `curriculum set`, `fault kill-worker`: changes of a run."""

from typing import Annotated

import typer

from orchestrator.cli.commands.runs import show_name
from orchestrator.cli.terminal.answers import ChangedPriority, KilledWorker, RemovedRun, RequestedState
from orchestrator.cli.terminal.format import counted
from orchestrator.cli.terminal.options import (
    GROUPS,
    STEER,
    Address,
    KeyFile,
    Output,
    RunId,
    Step,
    Storage,
    Timeout,
    Yes,
    confirm,
)
from orchestrator.cli.terminal.output import Format, narrate, narrate_wait, show_answer
from orchestrator.errors import UsageError
from orchestrator.protocol.messages import DesiredRunState

curriculum = typer.Typer(no_args_is_help=True, help="The stages of a run's curriculum.")
fault = typer.Typer(no_args_is_help=True, help="Injected faults, to test recovery.")


def scale(
    run: RunId,
    workers: Annotated[
        str,
        typer.Option("-w", "--workers", metavar="N|auto", help="Number of workers; auto: the job's autoscale decides."),
    ],
    address: Address = None,
    output: Output = Format.TEXT,
) -> None:
    """Change the number of a run's workers, within its job's min..max. No step is lost."""
    from orchestrator.client import OrchestratorClient

    size = _size(workers)
    client = OrchestratorClient(address)
    target = client.scale(run, size)
    if size is None:
        narrate(f"The job's autoscale decides the number of workers of run {run} from now on.")
        _show_target(run, target, output)
        return
    asked = counted(size, "worker")
    now = client.get(run).workers_now
    if now == size:
        narrate(f"Run {run} has {asked} and continues with them.")
    elif now > size:
        narrate(f"Run {run} continues with {asked} after its current step.")
    else:
        narrate(f"Run {run} will continue with {asked} as soon as they are ready.")
    _show_target(run, target, output)


def pause(run: RunId, address: Address = None, output: Output = Format.TEXT) -> None:
    """Write a checkpoint and free a run's resources; `resume` continues it."""
    from orchestrator.client import OrchestratorClient

    target = OrchestratorClient(address).pause(run)
    narrate(f"Run {run} pauses after its current step. `orchestrator resume {run}` continues it.")
    _show_target(run, target, output)


def resume(
    run: RunId,
    step: Step = None,
    workers: Annotated[
        int | None,
        typer.Option("-w", "--workers", min=1, help="Number of workers. Default: the number requested last."),
    ] = None,
    reset_residuals: Annotated[
        bool, typer.Option("--reset-residuals", help="Discard gradients that compression has not sent yet.")
    ] = False,
    take_over: Annotated[
        bool,
        typer.Option("--take-over", help="Even if it may be active in another cluster, which then ends its workers."),
    ] = False,
    new_code: Annotated[
        bool,
        typer.Option("--new-code", help="Use the job's own code as it is here now. Default: as it was submitted."),
    ] = False,
    key_file: KeyFile = None,
    storage: Annotated[
        str | None,
        typer.Option("--storage", metavar="DIR|URL", help="Run storage with the run, if this cluster doesn't know it."),
    ] = None,
    timeout: Timeout = None,
    address: Address = None,
    output: Output = Format.TEXT,
) -> None:
    """Resume a run from a checkpoint: after its end, or in a new cluster. It keeps its name and its MLflow run."""
    from orchestrator.client import OrchestratorClient

    OrchestratorClient(address).resume(
        run,
        storage=storage,
        step=step,
        workers=workers,
        reset_residuals=reset_residuals,
        take_over=take_over,
        signing_key=None if key_file is None else f"file:{key_file.absolute()}",
        new_code=new_code,
        timeout_s=timeout,
        on_wait=narrate_wait,
    )
    narrate(f"Run {run} resumes. Follow it with `orchestrator logs {run} -f`.")
    show_name(run, output)


def stop(
    run: RunId,
    now: Annotated[
        bool, typer.Option("--now", help="Write no checkpoint: steps after the newest one are lost.")
    ] = False,
    address: Address = None,
    output: Output = Format.TEXT,
) -> None:
    """End a run early. If it has trained, it writes a checkpoint first."""
    from orchestrator.client import OrchestratorClient

    target = OrchestratorClient(address).stop(run, now=now)
    if now:
        narrate(f"Run {run} ends at once, without a checkpoint.")
    else:
        narrate(f"Run {run} ends after its current step, with a checkpoint if it has trained.")
    _show_target(run, target, output)


def remove(
    run: RunId,
    yes: Yes = False,
    tracking: Annotated[bool, typer.Option("--tracking", help="Delete its MLflow run, too.")] = False,
    storage: Storage = None,
    address: Address = None,
    output: Output = Format.TEXT,
) -> None:
    """Remove the files of a run that has ended: records, logs and checkpoints. Prepared texts stay."""
    from orchestrator.cli.terminal.run_lookup import find_run
    from orchestrator.run_records.removal import refuse_active

    place = find_run(run, storage, address)
    status = place.status()
    refuse_active(status)
    what = " and its MLflow run" if tracking else ""
    confirm(f"Remove run {run} ({status.phase}, {status.step} of {status.steps} steps), {status.run_dir}{what}?", yes)
    directory = place.remove(tracking)
    narrate(f"Run {run} is removed{what}: {directory}.")
    show_answer(output, RemovedRun(run, directory))


def set_value(
    run: RunId,
    change: Annotated[str, typer.Argument(metavar="priority=N", help="The key and its new value.", show_default=False)],
    address: Address = None,
    output: Output = Format.TEXT,
) -> None:
    """Change the priority of an active run."""
    from orchestrator.client import OrchestratorClient
    from orchestrator.spec.job_file.live_changes import priority_of

    wanted = priority_of(change)  # before connecting to a cluster
    priority = OrchestratorClient(address).set_priority(run, wanted)
    narrate(f"Run {run} has priority {priority} from now on; `orchestrator ls` shows those of all runs.")
    show_answer(output, ChangedPriority(run, priority))


@curriculum.command("set")
def set_stage(
    run: RunId,
    name: Annotated[str, typer.Argument(metavar="next|NAME", help="The next stage, or one of the job's by name.")],
    address: Address = None,
    output: Output = Format.TEXT,
) -> None:
    """Switch a run to another stage of its curriculum. `events` shows the step at which it begins."""
    from orchestrator.client import OrchestratorClient

    target = OrchestratorClient(address).stage(run, name)
    which = "the next stage" if name == "next" else f"stage {name}"
    narrate(f"Run {run} switches to {which} in some steps, all workers at the same step.")
    _show_target(run, target, output)


@fault.command("kill-worker")
def kill_worker(
    run: RunId,
    rank: Annotated[int | None, typer.Option("--rank", min=0, help="Rank to kill. Default: the highest.")] = None,
    address: Address = None,
    output: Output = Format.TEXT,
) -> None:
    """Kill one worker's process, as a fault would, to test recovery. `status` shows what it cost."""
    from orchestrator.client import OrchestratorClient

    worker = OrchestratorClient(address).kill_worker(run, rank)
    narrate(f"Worker {worker} of run {run} is killed. `orchestrator events {run}` shows what follows.")
    show_answer(output, KilledWorker(run, worker))


def _size(workers: str) -> int | None:
    if workers == "auto":
        return None
    if not workers.isdecimal() or int(workers) < 1:
        raise UsageError(
            f"--workers is {workers!r}; it must be a whole number from 1, or auto", unchanged="Nothing was changed."
        )
    return int(workers)


def _show_target(run_id: str, target: DesiredRunState, output: Format) -> None:
    """Print the run's desired state for programs; users have read a message on stderr."""
    show_answer(output, RequestedState(**vars(target), run_id=run_id))


def register(main: typer.Typer) -> None:
    for name, command in (("scale", scale), ("pause", pause), ("resume", resume), ("stop", stop), ("rm", remove)):
        main.command(name, rich_help_panel=STEER)(command)
    main.command("set", rich_help_panel=STEER)(set_value)
    for name, group in (("fault", fault), ("curriculum", curriculum)):
        main.add_typer(group, name=name, rich_help_panel=GROUPS)
