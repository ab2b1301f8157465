"""Setup of a run's tracker, from its job. Needs no cluster: what waits after the end is delivered the same way."""

from hashlib import sha256
from pathlib import Path

from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.home import home
from orchestrator.storage.backends.location import Location
from orchestrator.tracking.sinks.sink import NOTE_TAG, ModelExport, RunInfo, TrackerSetup, flattened, redacted

EXPORT = "orchestrator.submission.model_process:export_registered"  # of a layer above, so by name
DIRECTORY = "tracking"  # in the run's directory, or this machine's


def outbox_of(run_dir: Location) -> Path:
    """Directory of what MLflow has not taken yet. Of a run in a bucket it is on this machine; on another it is made
    again, from the run's journal."""
    if isinstance(run_dir, Path):
        return run_dir / DIRECTORY
    return home() / DIRECTORY / f"{run_dir.name}-{sha256(str(run_dir).encode()).hexdigest()[:8]}"


def database_directory(storage: Location) -> Path:
    """Directory of the MLflow database of runs that name no other: run storage, or this machine's for a bucket."""
    return storage if isinstance(storage, Path) else home()


def tracker_setup(run_id: str, run_dir: Location, job: JobSpec) -> TrackerSetup:
    storage = database_directory(run_dir.parent)
    params = flattened(job.model_dump(mode="json", by_alias=True, exclude={"code"}))
    if job.code:
        params["code"] = ", ".join(sorted(job.code.values()))
    if job.tracking.uri is not None:
        params["tracking.uri"] = redacted(job.tracking.uri)
    run = RunInfo(
        run_id=run_id,
        name=run_id,
        params=params,
        tags={NOTE_TAG: description(run_dir, job)} | job.tracking.tags | {"orchestrator.run_dir": str(run_dir)},
        register_as=job.tracking.register_as,
        alias=job.tracking.alias,
        export=ModelExport(EXPORT, str(run_dir)),
    )
    return TrackerSetup(
        uri=job.tracking.uri or default_uri(storage),
        experiment=job.tracking.experiment,
        run=run,
        directory=str(outbox_of(run_dir)),
        artifacts=str(storage / "mlflow-artifacts"),
        sinks=tuple(job.tracking.sinks),
        root=str(run_dir) if isinstance(run_dir, Path) else "",
    )


def description(run_dir: Location, job: JobSpec) -> str:
    """What the run trains, in Markdown."""
    model, train, workers = job.model, job.train, job.workers
    if model.is_native:
        is_dense = model.first_k_dense_replace >= model.num_hidden_layers
        experts = "dense" if is_dense else f"{model.n_routed_experts} experts, {model.num_experts_per_tok} per token"
        what = f"{model.num_hidden_layers} layers of width {model.hidden_size}, {experts}"
    else:
        what = f"`{model.origin}`"
    size = str(workers.min) if workers.min == workers.max else f"{workers.min}..{workers.max}"
    lines = {
        "Task": f"`{job.task.entrypoint or job.task.name}`",
        "Model": f"{what}; begins with `{model.init_from}`" if model.init_from else what,
        "Data": f"`{job.data.entrypoint or job.data.source}`",
        "Training": f"{train.max_steps:,} steps of {train.global_batch_size} rows, {train.precision}",
        "Workers": size,
        "Run storage": f"`{run_dir}`",
    }
    return "\n".join(f"- **{name}:** {text}" for name, text in lines.items())


def default_uri(storage: Path) -> str:
    """The SQLite database in this directory."""
    return f"sqlite:///{storage / 'mlflow.db'}"
