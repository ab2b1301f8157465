"""What a submission adds to a run's tracking: MLflow's own variables, and who submitted which file at which commit."""

import getpass
import os
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from orchestrator.errors import UsageError
from orchestrator.spec.job import JobSpec
from orchestrator.tracking.sinks.sink import check_uri, is_directory, redacted

URI, EXPERIMENT = "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"
ALLOW_FILES = "MLFLOW_ALLOW_FILE_STORE"  # without it MLflow opens no directory of its files
TRUE = ("true", "1")  # as MLflow reads such a variable
GIT_S = 2.0  # a repository on a file system that hangs delays no submission


def with_provenance(spec: JobSpec, job_file: Path | None, environment: Mapping[str, str] = os.environ) -> JobSpec:
    """The job with MLflow's variables where it leaves these keys out, and with tags that it doesn't set itself.

    Raises:
        UsageError: the variable with the URI is one that can't be used, or the URI one that MLflow refuses.
    """
    tracking = spec.tracking
    changes: dict[str, object] = {"tags": tags_of(job_file) | tracking.tags}
    if tracking.uri is None and (uri := environment.get(URI)):
        changes["uri"] = _checked(uri)
    if "experiment" not in tracking.model_fields_set and (experiment := environment.get(EXPERIMENT)):
        changes["experiment"] = experiment
    changed = tracking.model_copy(update=changes)
    if changed.uri is not None and is_directory(changed.uri) and environment.get(ALLOW_FILES, "").lower() not in TRUE:
        raise UsageError(
            f"{'tracking.uri' if tracking.uri else URI} is {changed.uri}, and MLflow no longer maintains such files",
            remedy=f"Use its database, sqlite:////ABSOLUTE/PATH.db, to which `mlflow migrate-filestore` moves them; or "
            f"set {ALLOW_FILES}=true, MLflow's own way to keep them.",
            unchanged="Nothing was started.",
        )
    return spec.model_copy(update={"tracking": changed})


def _checked(uri: str) -> str:
    """The URI. Raises UsageError for one of a form that can't be used, or with a password."""
    try:
        check_uri(uri)
    except UsageError as error:
        raise UsageError(
            f"{URI} is set: {error.message}",
            remedy="Unset it or set it to one of them.",
            unchanged="Nothing was started.",
        ) from error
    if redacted(uri) != uri:
        raise UsageError(
            f"{URI} holds a password: {redacted(uri)}; the job would show it to everyone with access to the cluster",
            remedy="Leave it out of the URI, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for Ray.",
            unchanged="Nothing was started.",
        )
    return uri


def tags_of(job_file: Path | None) -> dict[str, str]:
    """Tags under MLflow's own names, which its pages show: user, file, and the commit of the directory that has it."""
    tags = {"mlflow.source.type": "JOB"}
    with suppress(OSError, KeyError):  # a user without a name
        tags["mlflow.user"] = getpass.getuser()
    if job_file is not None:
        tags["mlflow.source.name"] = str(job_file.absolute())
        if commit := _commit_of(job_file.absolute().parent):
            tags["mlflow.source.git.commit"] = commit
    return tags


def _commit_of(directory: Path) -> str:
    """The commit that is checked out; empty outside of a repository, or without git."""
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(directory), "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_S, check=True)
        return done.stdout.strip()
    return ""
