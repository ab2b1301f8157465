"""Checks of user-defined code before its run is submitted. A model is also built and run once, in a child process:
control code never imports torch."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from orchestrator.errors import EntrypointError, UsageError
from orchestrator.requirements import installed
from orchestrator.secrets import read_secret, without
from orchestrator.spec.job import JobSpec
from orchestrator.torch_process import run_module
from orchestrator.user_code import place_of

TIMEOUT_S = 120.0
REHEARSAL = "orchestrator.worker.check_user_code"
UNCHANGED = "Nothing was started."


def check_own_code(job: JobSpec) -> None:
    """Check that user-defined code is in the job's directory; import it, build its model and run its task on its first
    rows, as a worker would, with the packages that the job needs. Does nothing for a job without such code.

    Raises:
        UsageError: these packages can't be installed.
        EntrypointError: there is no such module, or it can't be trained. Carries the traceback of the user's code.
    """
    check_places(job)
    if not job.model.is_native or any(key != "curriculum.signal" for key, _, _ in own_code_of(job)):
        if job.pip:
            installed(job.pip, {**job.envs, **_secrets_here(job)[0]})  # before the time that the process has
        _rehearse(job.model_dump_json(by_alias=True))


def own_code_of(job: JobSpec) -> Iterator[tuple[str, str, str]]:
    """Key in the job file, name and directory of each user-defined function."""
    if job.model.entrypoint is not None:
        yield "model.entrypoint", job.model.entrypoint, job.model.code_dir
    if job.task.entrypoint is not None:
        yield "task.entrypoint", job.task.entrypoint, job.task.code_dir
    if job.data.entrypoint is not None:
        yield "data.entrypoint", job.data.entrypoint, job.data.code_dir
    if job.train.lr_scheduler.entrypoint is not None:
        schedule = job.train.lr_scheduler
        yield "train.lr_scheduler.entrypoint", str(schedule.entrypoint), schedule.code_dir
    for i, callback in enumerate(job.callbacks):
        yield f"callbacks[{i}].entrypoint", callback.entrypoint, callback.code_dir
    if job.curriculum is not None and ":" in job.curriculum.signal:
        yield "curriculum.signal", job.curriculum.signal, job.curriculum.code_dir


def check_places(job: JobSpec) -> None:
    """Check that user-defined modules are where the job names them, without running them. Raises EntrypointError."""
    for key, name, directory in own_code_of(job):
        try:
            place_of(name.partition(":")[0], Path(directory).expanduser().absolute())
        except ImportError as error:
            raise EntrypointError(
                f"{key} {name} can't be imported: {type(error).__name__}: {error}",
                remedy=f"Name a function of a module in this directory, or set {key.rpartition('.')[0]}.code_dir.",
                unchanged=UNCHANGED,
            ) from None


@cache  # a command checks a job before it connects to a cluster, and again as it submits it
def _rehearse(job_json: str) -> None:
    job = JobSpec.model_validate_json(job_json)
    secrets, missing = _secrets_here(job)
    of_user = [f"{key} {name}" for key, name, _ in own_code_of(job) if key != "curriculum.signal"]
    named = ", ".join(of_user or [f"the model of {job.model.origin}"])
    try:
        done = run_module(REHEARSAL, job_json, {**job.envs, **secrets}, TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise EntrypointError(
            f"{named} was neither tried nor refused within {TIMEOUT_S:.0f} s",
            remedy="It is imported, built and run on a row or two: let none of it wait or compute for long.",
            unchanged=UNCHANGED,
        ) from None
    if done.returncode != 0:
        raise EntrypointError(
            f"the process that tried {named} ended with code {done.returncode}",
            traceback=without(done.stderr, secrets.values()),
            unchanged=UNCHANGED,
        )
    fault: dict[str, str] | None = json.loads(done.stdout)
    if fault is not None:
        fields = {key: without(text, secrets.values()) for key, text in fault.items()}
        if missing:
            fields["remedy"] += f" The job's secrets that are not on this machine were not set: {', '.join(missing)}."
        raise EntrypointError(**fields, unchanged=UNCHANGED)


def _secrets_here(job: JobSpec) -> tuple[dict[str, str], list[str]]:
    """The job's secrets, and the names of those that only nodes of the cluster have."""
    found: dict[str, str] = {}
    for name, reference in job.secrets.items():
        with suppress(UsageError):
            found[name] = read_secret(name, reference)
    return found, [name for name in job.secrets if name not in found]
