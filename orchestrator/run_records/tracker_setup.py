"""Setup of a run's tracker, from its job. Needs no cluster: what waits after the end is delivered the same way."""

from hashlib import sha256
from pathlib import Path

from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.home import home
from orchestrator.storage.backends.location import Location
from orchestrator.tracking.sinks.sink import RunInfo, TrackerSetup, flattened, redacted

NOTE = "mlflow.note.content"  # MLflow's own name of a run's description
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
    params = flattened(job.model_dump(mode="json", by_alias=True))
    if job.tracking.uri is not None:
        params["tracking.uri"] = redacted(job.tracking.uri)
    run = RunInfo(
        run_id=run_id,
        name=run_id,
        params=params,
        tags={NOTE: f"Run storage: `{run_dir}`"} | job.tracking.tags | {"orchestrator.run_dir": str(run_dir)},
        register_as=job.tracking.register_as,
        alias=job.tracking.alias,
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


def default_uri(storage: Path) -> str:
    """The SQLite database in this directory."""
    return f"sqlite:///{storage / 'mlflow.db'}"
