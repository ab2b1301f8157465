"""`init` and `doctor`: before the first run."""

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.terminal.options import BEGIN, Output
from orchestrator.cli.terminal.output import Format, narrate, show, show_json

TEMPLATE = """\
# A job for `orchestrator run {file}`. It trains a small model on Python's own library, in some minutes on two cores.
# `orchestrator job validate` checks it, `orchestrator job plan` shows its needs; every key: docs/job-file.md
schema: v1
name: {name}                  # used once per storage; --name gives another run of this job its own
workers:
  min: 1                         # `orchestrator scale` may ask for min..max, while the run trains
  max: 4
  initial: 2
resources: {{cpus: 1}}             # reserved for each worker
model:
  hidden_size: 128
  num_hidden_layers: 4
  num_attention_heads: 4
  num_key_value_heads: 2
  intermediate_size: 384         # of dense layers
  n_routed_experts: 8            # 1 for a dense model
  num_experts_per_tok: 2
  moe_intermediate_size: 192
train:
  max_steps: 300
  global_batch_size: 16          # rows of a step, at any number of workers
  micro_batch_size: 4
  sequence_length: 128           # tokens of a row
  lr: 3.0e-3
eval: {{every: 50}}
data:
  source: "builtin:stdlib"       # or a folder or file of text, JSON lines or Parquet
  vocab_size: 2048
checkpoint: {{every: 100, keep_last: 3}}
storage: ./runs                  # where the run's files go
"""


def init(
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The job file to write.")] = Path("job.yaml"),
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="The run's name in it.")] = "my-run",
) -> None:
    """Write a job file with comments, ready to run. Overwrites nothing. Prints its path."""
    from orchestrator.errors import StorageError, UsageError
    from orchestrator.spec.job_file.loading import parse_job

    text = TEMPLATE.format(file=out, name=name)
    parse_job(text, str(out))  # refuses a name that no run can have
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError(
            f"{out} exists already", remedy="Name another file: --out FILE.", unchanged="Nothing was written."
        ) from None
    except OSError as error:
        raise StorageError(f"{out} can't be written: {error.strerror}", unchanged="Nothing was written.") from error
    narrate(f"Run it with `orchestrator run {out}`.")
    show(str(out))


def doctor(
    storage: Annotated[str, typer.Option("--storage", metavar="DIR|URL", help="Run storage to check.")] = "runs",
    output: Output = Format.TEXT,
) -> None:
    """Check this machine for problems. Changes nothing. Exits 3 if something would fail."""
    from orchestrator.cli.terminal.exit_codes import CHECK_FAILED
    from orchestrator.cluster.doctor import Verdict, examine
    from orchestrator.protocol.codec import to_plain
    from orchestrator.storage.backends.location import location_of

    found = list(examine(location_of(storage)))
    if output is Format.JSON:
        show_json([to_plain(finding) for finding in found])
    else:
        for finding in found:
            show(f"{finding.verdict:<8} {finding.subject:<10} {finding.text}")
            if finding.remedy:
                show(f"{'':<19} {finding.remedy}")
    if any(finding.verdict is Verdict.FAULT for finding in found):
        raise typer.Exit(CHECK_FAILED)


def register(main: typer.Typer) -> None:
    for command in (init, doctor):
        main.command(rich_help_panel=BEGIN)(command)
