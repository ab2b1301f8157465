"""A job made ready to be handed to the cluster: read, renamed, every path absolute, checked as far as is known here."""

import os
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError

from orchestrator.data.files import KINDS, suffix_of
from orchestrator.data.folders import text_files
from orchestrator.errors import DataError, NameTaken, UsageError
from orchestrator.spec.job import JobSpec
from orchestrator.spec.loading import load_job


@dataclass(frozen=True)
class Order:
    """What the Scheduler needs: the job with every path absolute, and the text that the user wrote."""

    spec: JobSpec
    text: str

    @property
    def run_dir(self) -> str:
        return str(Path(self.spec.storage) / self.spec.name)

    @property
    def job_json(self) -> str:
        return self.spec.model_dump_json(by_alias=True)


def order_of(job: JobSpec | str | os.PathLike[str], name: str | None) -> Order:
    """Read and resolve a job; checked as far as is possible from here."""
    if isinstance(job, JobSpec):
        spec, text = job, yaml.safe_dump(job.model_dump(mode="json", by_alias=True), sort_keys=False)
    else:
        spec, text = load_job(job), Path(job).read_text(encoding="utf-8")
    if name is not None:
        spec = _renamed(spec, name)
    run_dir = spec.storage_path / spec.name
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise NameTaken(
            f"{run_dir} exists already; a run's name must be new in its storage",
            remedy="Choose another name (--name) or storage, or move that directory away.",
            unchanged="Nothing was started.",
        )
    source = _absolute_source(spec.data.source)
    data = spec.data.model_copy(update={"source": source})
    resolved = spec.model_copy(update={"storage": str(spec.storage_path), "data": data})
    return Order(resolved, text)


def _renamed(spec: JobSpec, name: str) -> JobSpec:
    try:
        return JobSpec.model_validate(spec.model_dump(by_alias=True) | {"name": name})
    except ValidationError as error:
        raise UsageError(
            f"{name!r} can't be a run's name: {error.errors()[0]['msg']}", unchanged="Nothing was started."
        ) from error


def _absolute_source(source: str) -> str:
    if source.startswith("builtin:"):
        return source
    path = Path(source).expanduser().absolute()
    if not path.exists():
        wrong = "does not exist"
    elif path.is_dir():
        wrong = "" if text_files(path) else f"holds no file of {KINDS}"
    else:
        wrong = "" if suffix_of(path) else f"is none of {KINDS}"
    if wrong:
        raise DataError(
            f"data.source {path} {wrong}",
            remedy="Name a folder of such files, one of them, or builtin:stdlib.",
            unchanged="Nothing was started.",
        )
    return str(path)
