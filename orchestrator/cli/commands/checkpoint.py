"""`checkpoint ls | now | verify | rm | adopt`: the checkpoints of a run."""

import time
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.terminal.answers import AdoptedRun, ListedCheckpoint, NamedCheckpoint
from orchestrator.cli.terminal.format import moment, number, size
from orchestrator.cli.terminal.options import GROUPS, Address, Output, RunId, Step, Storage, Yes, confirm
from orchestrator.cli.terminal.output import Format, narrate, show_answer, show_json, show_table
from orchestrator.errors import NotFinished
from orchestrator.protocol.codec import to_plain

LOOK_EVERY_S = 0.2

app = typer.Typer(no_args_is_help=True, help="The checkpoints of a run.")


@app.command("ls")
def list_all(run: RunId, storage: Storage = None, address: Address = None, output: Output = Format.TEXT) -> None:
    """List a run's complete checkpoints, the oldest first."""
    from orchestrator.checkpoint.manifest import MANIFEST_FILE
    from orchestrator.checkpoint.read import read_manifest
    from orchestrator.cli.terminal.run_lookup import find_run
    from orchestrator.errors import CheckpointCorrupt
    from orchestrator.run_records.checkpoints.search import path_of
    from orchestrator.storage.backends.location import objects_at
    from orchestrator.storage.backends.probe import reading

    files = find_run(run, storage, address).files
    records = {record.step: record for record in files.steps()}
    found = []
    for complete in files.checkpoints():
        path = path_of(files.run_dir, complete)
        try:
            with reading(path):
                manifest = read_manifest(path, complete.sha256)
                stored = objects_at(path).objects("")
        except CheckpointCorrupt as error:  # removed just now, or damaged
            narrate(f"The checkpoint of step {complete.step} is left out. {error}")
            continue
        record = records.get(manifest.step)
        num_bytes = sum(entry.num_bytes for entry in manifest.files.values())
        written_time = next((o.written_s for o in stored if o.key == MANIFEST_FILE), 0.0)
        loss, validation_loss = (record.loss, record.validation_loss) if record else (None, None)
        found.append(ListedCheckpoint(manifest.step, num_bytes, loss, validation_loss, written_time, str(path)))
    if output is Format.JSON:
        show_json(to_plain(found))
        return
    rows = [
        (str(c.step), size(c.bytes), number(c.loss), number(c.validation_loss), moment(c.time), c.path) for c in found
    ]
    show_table(("STEP", "SIZE", "LOSS", "VAL", "WRITTEN", "PATH"), rows)


@app.command()
def now(
    run: RunId,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0, metavar="SECONDS", help="How long to wait until it is complete.")
    ] = 60.0,
    address: Address = None,
    output: Output = Format.TEXT,
) -> None:
    """Write a checkpoint of an active run besides those of its job, and wait for it. Exits 101 if it takes longer."""
    from orchestrator.client import OrchestratorClient

    client = OrchestratorClient(address)
    step, deadline_s = client.checkpoint(run).checkpoint, time.monotonic() + timeout
    status = client.get(run)
    while status.checkpoint_step is None or status.checkpoint_step < step:
        if status.phase.ended or time.monotonic() > deadline_s:
            raise NotFinished(
                f"run {run} is {status.phase}, and a checkpoint of step {step} or a later one is not complete",
                remedy=f"`orchestrator checkpoint ls {run}` shows which are.",
            )
        time.sleep(LOOK_EVERY_S)
        status = client.get(run)
    narrate(f"The checkpoint of step {status.checkpoint_step} of run {run} is complete: {status.checkpoint}.")
    show_answer(output, NamedCheckpoint(run, status.checkpoint_step, str(status.checkpoint)))


@app.command()
def verify(
    run: RunId, step: Step = None, storage: Storage = None, address: Address = None, output: Output = Format.TEXT
) -> None:
    """Compare every file of a checkpoint with its digest. Exits 104 if one is missing or changed."""
    from orchestrator.checkpoint.read import read_manifest
    from orchestrator.cli.terminal.run_lookup import find_run
    from orchestrator.storage.backends.probe import reading
    from orchestrator.submission.model_process import checkpoint_to_ask

    path = checkpoint_to_ask(run, find_run(run, storage, address).files.run_dir, step)
    with reading(path):
        manifest = read_manifest(path)
    num_bytes = sum(entry.num_bytes for entry in manifest.files.values())
    tensors = f"{len(manifest.tensors)} tensors in {len(manifest.files)} files, {size(num_bytes)}"
    narrate(f"{path} is whole: step {manifest.step} of run {manifest.run_id}, {tensors}.")
    show_answer(output, NamedCheckpoint(run, manifest.step, str(path)))


@app.command("rm")
def remove(
    run: RunId,
    step: Annotated[int, typer.Option("--step", min=0, metavar="STEP", help="The checkpoint of this step.")],
    yes: Yes = False,
    storage: Storage = None,
    address: Address = None,
    output: Output = Format.TEXT,
) -> None:
    """Remove one checkpoint of a run. The newest one of a run that has not ended is refused."""
    from orchestrator.cli.terminal.run_lookup import find_run
    from orchestrator.run_records.removal import find_removable, remove_checkpoint

    run_dir = find_run(run, storage, address).files.run_dir
    path = find_removable(run_dir, step)
    confirm(f"Remove {path}?", yes)
    remove_checkpoint(path)
    narrate(f"The checkpoint of step {step} of run {run} is removed: {path}.")
    show_answer(output, NamedCheckpoint(run, step, str(path)))


@app.command()
def adopt(
    run: RunId,
    step: Step = None,
    key_file: Annotated[
        Path | None,
        typer.Option("--key-file", metavar="FILE", help="The new key. Default: that of `signing_key: auto`."),
    ] = None,
    yes: Yes = False,
    storage: Storage = None,
    address: Address = None,
    output: Output = Format.TEXT,
) -> None:
    """Sign a run's records with another key, when its key was lost or is to be replaced.

    The checkpoint and all records are read first and must be whole, but anyone who can write to the storage may have
    changed them.
    """
    from orchestrator.cli.terminal.run_lookup import find_run
    from orchestrator.storage.backends.signing_keys import AUTO, read_key
    from orchestrator.submission.adoption import adopt_records

    found = find_run(run, storage, address)
    run_dir = found.files.run_dir
    confirm(f"Believe the records in {run_dir} as they are now, and sign them with another key?", yes)
    key = read_key(AUTO if key_file is None else f"file:{key_file.absolute()}")
    adopted = adopt_records(run_dir, key, step)
    if found.is_in_cluster:
        from orchestrator.cluster.published.published_keys import publish_key  # imports Ray

        publish_key(run_dir, key)
    whole = f"; {adopted.checkpoint.name} is whole" if adopted.checkpoint is not None else ""
    narrate(f"{adopted.num_objects} records of run {run} count as signed with key {key.id}{whole}.")
    show_answer(output, AdoptedRun(run, adopted.key_id, adopted.num_objects, str(adopted.checkpoint or "")))


def register(main: typer.Typer) -> None:
    main.add_typer(app, name="checkpoint", rich_help_panel=GROUPS)
