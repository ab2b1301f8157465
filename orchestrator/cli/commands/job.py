"""`job validate | plan | schema`: job files, without a cluster."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated

import typer

from orchestrator.cli.terminal.format import NONE, counted, size
from orchestrator.cli.terminal.options import GROUPS, JobFile, Output, Set
from orchestrator.cli.terminal.output import Format, narrate, show, show_json, show_table
from orchestrator.errors import UsageError
from orchestrator.policy.cluster.node_pools import shown
from orchestrator.policy.estimate.job_plan import JobPlan, WorldPlan
from orchestrator.policy.estimate.memory_check import check_memory, crowding
from orchestrator.protocol.codec import to_plain
from orchestrator.spec.data import BY_DOCUMENT
from orchestrator.spec.job import JobSpec
from orchestrator.spec.workers import WorkersSpec

LINK_BYTES_PER_S = 125e6
NOTES = (
    "Memory is of the worker that holds most; bytes per step are what all workers together send to others, collectives "
    "as in a ring. Estimates: gradients, activations, loss, dispatch and combine (experts equally popular), and the "
    "stall (constants of 2 cores and loopback at 0.5 GB/s). Seconds beside gradients are what one worker's take on a "
    "link of 1 Gbit/s; with overlap a step waits for less. The tokenizer may find fewer tokens than data.vocab_size."
)

app = typer.Typer(no_args_is_help=True, help="Job files, without a cluster.")


@app.command()
def validate(job: JobFile, settings: Set = None, output: Output = Format.TEXT) -> None:
    """Check a job file. Exits 2 with every mistake, its line and its column; starts nothing. With -o json
    prints the job with every default."""
    from orchestrator.spec.job_file.loading import load_job
    from orchestrator.submission.submission import with_pretrained
    from orchestrator.submission.teacher_choice import with_teacher
    from orchestrator.submission.user_code import check_own_code, with_packages

    spec = with_teacher(with_pretrained(load_job(job, settings or [])))
    check_own_code(*with_packages(spec))
    if output is Format.JSON:
        show_json(spec.model_dump(mode="json", by_alias=True))
    workers = spec.workers
    narrate(
        f"{job} is valid: run {spec.name}, {spec.train.max_steps} steps, {counted(workers.initial, 'worker')} at first "
        f"({workers.min} to {workers.max}){_pool(workers)}, {spec.model.n_routed_experts} experts"
    )


@app.command()
def schema() -> None:
    """Print the JSON Schema of job files, with every key, its default and its meaning."""
    from orchestrator.spec.job import JobSpec

    show_json(JobSpec.model_json_schema(by_alias=True))


@app.command()
def plan(
    job: JobFile,
    workers: Annotated[
        int | None,
        typer.Option("-w", "--workers", min=1, help="Only this world size. Default: all from min to max."),
    ] = None,
    settings: Set = None,
    output: Output = Format.TEXT,
) -> None:
    """Show a job's needs at each world size: memory by part, bytes per step by kind, the stall of a rescale.

    Refuses a job whose workers don't fit their resources.memory, as `run` and `submit` do.
    """
    import psutil

    from orchestrator.spec.job_file.loading import load_job
    from orchestrator.submission.param_listing import plan_of
    from orchestrator.submission.submission import with_pretrained
    from orchestrator.submission.teacher_choice import with_teacher
    from orchestrator.submission.user_code import check_own_code, with_packages

    spec = with_teacher(with_pretrained(load_job(job, settings or [])))
    check_own_code(*with_packages(spec))
    bounds = spec.workers
    if workers is not None and not bounds.min <= workers <= bounds.max:
        raise UsageError(f"{workers} workers asked for; {spec.name} allows {bounds.min} to {bounds.max}")
    planned = plan_of(spec)
    if workers is not None:
        planned = replace(planned, worlds=tuple(w for w in planned.worlds if w.world_size == workers))
    if output is Format.JSON:
        show_json(to_plain(planned))
    else:
        narrate(" ".join([NOTES, *_notes(spec)]))
        _show(planned)
    check_memory(spec, planned)  # after the figures, which show why
    if warning := crowding(spec, planned, psutil.virtual_memory().total):
        narrate(f"Warning: {warning}")


def _pool(workers: WorkersSpec) -> str:
    """A suffix that names the nodes on which workers may live; empty for all nodes."""
    return f" on nodes with labels {shown(workers.label_selector)}" if workers.label_selector else ""


def _notes(spec: JobSpec) -> Iterator[str]:
    if spec.workers.label_selector:
        yield f"Workers live{_pool(spec.workers)} only."
    if spec.train.fits_memory:
        yield "micro_batch_size is auto: micro-batches begin with one row, as shown here, and grow to fit memory."
    if spec.data.row_format == BY_DOCUMENT:
        yield "Rows are documents: all are assumed to have the maximum length."


def _show(planned: JobPlan) -> None:
    trained = "" if planned.num_trained == planned.num_parameters else f", {planned.num_trained:,} of them trained"
    show(f"{planned.num_parameters:,} parameters{trained}, {planned.vocab_size} tokens in the vocabulary\n")
    worlds = planned.worlds
    head = [str(world.world_size) for world in worlds]
    layout = [
        ("experts per worker", [_spread(world.experts) for world in worlds]),
        ("micro-batches per worker", [_spread(world.micro_batches) for world in worlds]),
    ]
    state, work = ("weights", "masters", "moments", "buffers", "kept"), ("gradients", "activations", "loss")
    parts = (*state, *work, "snapshots", "deltas", "teacher", "process")
    memory = [(part, [_size(getattr(world.memory, part)) for world in worlds]) for part in parts]
    memory += [
        ("together", [size(world.memory.training) for world in worlds]),
        ("peak, at a fence too", [size(world.memory.peak) for world in worlds]),
        ("of it on a GPU", [size(world.memory.on_gpu) for world in worlds]),
    ]
    kinds = ("gradients_reduced", "parameters_gathered", "dispatch", "combine", "control", "snapshots", "total")
    traffic = [(kind.replace("_", " "), [size(getattr(world.traffic, kind)) for world in worlds]) for kind in kinds]
    _section("WORKERS", head, layout)
    _section("MEMORY", head, memory)
    _section("BYTES PER STEP", head, traffic)
    if any(world.world_size > 1 for world in worlds):
        _section("GRADIENTS BY COMPRESSION", head, _by_scheme(worlds))
    rescales = [
        (f"{world.world_size} -> {to.to_size}", size(to.moved_bytes), size(to.busiest_bytes), f"{to.stall_s:.2f} s")
        for world in worlds
        for to in world.rescales
    ]
    if rescales:
        show_table(("RESCALE", "MOVED", "BUSIEST WORKER", "STALL"), rescales)


def _by_scheme(worlds: tuple[WorldPlan, ...]) -> list[tuple[str, list[str]]]:
    """Bytes that each scheme would send, and seconds that one worker's part of them takes on a link."""
    rows = []
    for place, (scheme, _) in enumerate(worlds[0].traffic.gradients_by_scheme):
        cells = []
        for world in worlds:
            num_bytes = world.traffic.gradients_by_scheme[place][1]
            seconds = num_bytes / world.world_size / LINK_BYTES_PER_S
            cells.append(f"{size(num_bytes)}, {seconds:.3f} s")
        rows.append((scheme, cells))
    return rows


def _section(title: str, head: list[str], rows: list[tuple[str, list[str]]]) -> None:
    show_table((title, *head), [(name, *cells) for name, cells in rows])
    show("")


def _spread(counts: tuple[int, ...]) -> str:
    """The distinct counts of the ranks, the highest first."""
    return "/".join(str(count) for count in sorted(set(counts), reverse=True))


def _size(num_bytes: int | None) -> str:
    return NONE if num_bytes is None else size(num_bytes)


def register(main: typer.Typer) -> None:
    main.add_typer(app, name="job", rich_help_panel=GROUPS)
