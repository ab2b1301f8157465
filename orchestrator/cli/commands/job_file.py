"""`validate` and `schema`: job files without a cluster."""

import typer

from orchestrator.cli.terminal.format import counted, pool
from orchestrator.cli.terminal.options import JobFile, Output
from orchestrator.cli.terminal.output import Format, say, show_json


def validate(job: JobFile, output: Output = Format.TEXT) -> None:
    """Check a job file. Exits 2 with every mistake, its line and its column; starts nothing. With -o json
    prints the job with every default."""
    from orchestrator.spec.loading import load_job
    from orchestrator.submission.submission import with_pretrained
    from orchestrator.submission.user_code import check_own_code

    spec = with_pretrained(load_job(job))
    check_own_code(spec)
    if output is Format.JSON:
        show_json(spec.model_dump(mode="json", by_alias=True))
    workers = spec.workers
    say(
        f"{job} is valid: run {spec.name}, {spec.train.max_steps} steps, {counted(workers.initial, 'worker')} at first "
        f"({workers.min} to {workers.max}){pool(workers)}, {spec.model.n_routed_experts} experts"
    )


def schema() -> None:
    """Print the JSON Schema of job files, with every key, its default and its meaning."""
    from orchestrator.spec.job import JobSpec

    show_json(JobSpec.model_json_schema(by_alias=True))


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Job files")(validate)
    app.command(rich_help_panel="Job files")(schema)
