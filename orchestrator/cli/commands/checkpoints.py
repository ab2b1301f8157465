"""`checkpoints`, `checkpoint verify`: list and check the checkpoints of a run."""

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.terminal.format import moment, number, size
from orchestrator.cli.terminal.options import Address, Output, RunId, Storage
from orchestrator.cli.terminal.output import Format, say, show_json, show_table

app = typer.Typer(no_args_is_help=True, help="Check checkpoints.")


def checkpoints(run: RunId, storage: Storage = None, address: Address = None, output: Output = Format.TEXT) -> None:
    """List a run's complete checkpoints, the oldest first."""
    from orchestrator.checkpoint.read import list_checkpoints, read_manifest
    from orchestrator.cli.terminal.run_lookup import find_run

    files = find_run(run, storage, address).files
    losses = {record.step: record for record in files.steps()}
    found, rows = [], []
    for path in list_checkpoints(files.run_dir / "checkpoints"):
        manifest = read_manifest(path)
        record = losses.get(manifest.step)
        num_bytes = sum(entry.num_bytes for entry in manifest.files.values())
        written = (path / "manifest.json").stat().st_mtime
        loss, validation_loss = (record.loss, record.validation_loss) if record else (None, None)
        found.append(
            {
                "step": manifest.step,
                "bytes": num_bytes,
                "loss": loss,
                "validation_loss": validation_loss,
                "time": written,
                "path": str(path),
            }
        )
        rows.append(
            (str(manifest.step), size(num_bytes), number(loss), number(validation_loss), moment(written), str(path))
        )
    if output is Format.JSON:
        show_json(found)
    else:
        show_table(("STEP", "SIZE", "LOSS", "VAL", "WRITTEN", "PATH"), rows)


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="Directory of a checkpoint.", show_default=False)],
    output: Output = Format.TEXT,
) -> None:
    """Compare every file of a checkpoint with its digest. Exits 100 if one is missing or changed."""
    from orchestrator.checkpoint.read import CheckpointReader
    from orchestrator.errors import NotFound

    if not path.is_dir():
        raise NotFound(f"{path} is no directory", remedy="`orchestrator checkpoints RUN` lists a run's checkpoints.")
    with CheckpointReader(path.absolute()) as reader:
        reader.verify()
        manifest = reader.manifest
    num_bytes = sum(entry.num_bytes for entry in manifest.files.values())
    tensors = f"{len(manifest.tensors)} tensors in {len(manifest.files)} files, {size(num_bytes)}"
    if output is Format.JSON:
        show_json({"path": str(path), "run_id": manifest.run_id, "step": manifest.step, "bytes": num_bytes})
    say(f"{path} is whole: step {manifest.step} of run {manifest.run_id}, {tensors}.")


def register(main: typer.Typer) -> None:
    main.command(rich_help_panel="Records")(checkpoints)
    main.add_typer(app, name="checkpoint", rich_help_panel="Records")
