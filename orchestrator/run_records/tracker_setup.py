"""Setup of a run's tracker, from its job. Needs no cluster: what waits after the end is delivered the same way."""

from pathlib import Path

from orchestrator.spec.job import JobSpec
from orchestrator.tracking.sink import RunInfo, TrackerSetup, flattened, redacted

DIRECTORY = "tracking"  # in the run's directory


def tracker_setup(run_id: str, run_dir: Path, job: JobSpec) -> TrackerSetup:
    storage = run_dir.parent
    params = flattened(job.model_dump(mode="json", by_alias=True))
    if job.tracking.uri is not None:
        params["tracking.uri"] = redacted(job.tracking.uri)
    run = RunInfo(
        run_id=run_id,
        name=run_id,
        params=params,
        tags={"orchestrator.run_dir": str(run_dir)},
        register_as=job.tracking.register_as,
        alias=job.tracking.alias,
    )
    return TrackerSetup(
        uri=job.tracking.uri or default_uri(storage),
        experiment=job.tracking.experiment,
        run=run,
        directory=str(run_dir / DIRECTORY),
        artifacts=str(storage / "mlflow-artifacts"),
    )


def default_uri(storage: Path) -> str:
    """The SQLite database in run storage."""
    return f"sqlite:///{storage / 'mlflow.db'}"
