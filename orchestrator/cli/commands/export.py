"""`export`: write a run's model for other libraries."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.terminal.format import size
from orchestrator.cli.terminal.options import Address, Output, RunId, Storage
from orchestrator.cli.terminal.output import Format, say, show, show_json


class ModelFormat(StrEnum):
    HF = "hf"


class Dtype(StrEnum):
    FP32 = "fp32"
    BF16 = "bf16"


def export(
    run: RunId,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="A new directory.", show_default=False)],
    model_format: Annotated[
        ModelFormat, typer.Option("--format", help="hf: as transformers loads it.")
    ] = ModelFormat.HF,
    from_step: Annotated[
        int | None, typer.Option("--from", min=0, metavar="STEP", help="The checkpoint. Default: the newest.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Of the weights; routers stay fp32.")] = Dtype.BF16,
    storage: Storage = None,
    address: Address = None,
    output: Output = Format.TEXT,
) -> None:
    """Write a run's model as a directory that other libraries load. Prints the directory."""
    from orchestrator.checkpoint.hf.export import export_hf
    from orchestrator.checkpoint.read import choose
    from orchestrator.cli.terminal.run_lookup import find_run
    from orchestrator.errors import NotFound
    from orchestrator.spec.job import JobSpec

    run_dir = find_run(run, storage, address).files.run_dir
    checkpoint = choose(run_dir / "checkpoints", from_step)
    if checkpoint is None:
        raise NotFound(f"run {run} has no checkpoint yet", unchanged="Nothing was written.")
    job = JobSpec.model_validate_json((run_dir / "job.json").read_text())
    num_bytes = export_hf(checkpoint, job, run_dir / "tokenizer.json", to.absolute(), dtype.value)
    say(f"{checkpoint.name} of run {run} as {dtype}: {size(num_bytes)} of weights.")
    if output is Format.JSON:
        show_json({"run": run, "checkpoint": str(checkpoint), "path": str(to.absolute()), "bytes": num_bytes})
    else:
        show(str(to))


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Models")(export)
