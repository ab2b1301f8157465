"""Checks of user-defined code before its run is submitted. A model is also built and run once, in a child process:
control code never imports torch."""

import json
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

from orchestrator.code_archive import packed, unpack
from orchestrator.code_package import of_user
from orchestrator.errors import EntrypointError, UsageError
from orchestrator.requirements import installed
from orchestrator.secrets import read_secret, without
from orchestrator.spec.job import JobSpec
from orchestrator.spec.keys.section import with_code_dirs
from orchestrator.storage.backends.location import location_of
from orchestrator.torch_process import run_module
from orchestrator.user_code import place_of

TIMEOUT_S = 120.0
REHEARSAL = "orchestrator.worker.check_user_code"
UNCHANGED = "Nothing was started."
_tried: set[str] = set()  # jobs: a command checks one before it connects to a cluster, and again as it submits it


def with_packages(job: JobSpec) -> tuple[JobSpec, dict[str, bytes]]:
    """The job with the directories of its own code as absolute paths and their digests, and the packages by these.

    Raises:
        EntrypointError: a user-defined module isn't where the job names it.
        UsageError: its directory is too large, or can't be read.
    """
    check_places(job)
    job = with_code_dirs(job, lambda directory: str(Path(directory).expanduser().absolute()))
    storage = location_of(job.storage)
    directories = sorted({directory for _, _, directory in own_code_of(job)})
    packages = {directory: packed(Path(directory), storage) for directory in directories}
    code = {directory: sha256(package).hexdigest() for directory, package in packages.items()}
    return job.model_copy(update={"code": code}), {code[directory]: packages[directory] for directory in code}


def check_own_code(job: JobSpec, packages: Mapping[str, bytes]) -> None:
    """Import the code of these packages, build the job's model and run its task on its first rows, as a worker would,
    with the packages that the job needs. Does nothing for a job without user-defined code.

    Raises:
        UsageError: packages of `pip` can't be installed.
        EntrypointError: it can't be trained. Carries the traceback of the user's code.
    """
    if not job.model.is_native or any(key != "curriculum.signal" for key, _, _ in own_code_of(job)):
        if job.pip:
            installed(job.pip, {**job.envs, **_secrets_here(job)[0]})  # before the time that the process has
        if (job_json := job.model_dump_json(by_alias=True)) not in _tried:
            _rehearse(job, packages)
            _tried.add(job_json)


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


def _rehearse(job: JobSpec, packages: Mapping[str, bytes]) -> None:
    secrets, missing = _secrets_here(job)
    own = [f"{key} {name}" for key, name, _ in own_code_of(job) if key != "curriculum.signal"]
    named = ", ".join(own or [f"the model of {job.model.origin}"])
    try:
        with TemporaryDirectory(prefix="orchestrator-code-") as above:
            places = {directory: f"{Path(above).resolve()}/{digest}" for directory, digest in job.code.items()}
            submitted = {place: directory for directory, place in places.items()}
            for digest, package in packages.items():
                unpack(package, Path(above, digest))
            here = with_code_dirs(job, places.__getitem__).model_dump_json(by_alias=True)
            done = run_module(REHEARSAL, here, {**job.envs, **secrets}, TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise EntrypointError(
            f"the check of {named} did not end within {TIMEOUT_S:.0f} s",
            remedy="It is imported, built and run on a row or two: let none of it wait or compute for long.",
            unchanged=UNCHANGED,
        ) from None
    if done.returncode != 0:
        raise EntrypointError(
            f"the process that checked {named} ended with code {done.returncode}",
            traceback=of_user(without(done.stderr, secrets.values()), submitted),
            unchanged=UNCHANGED,
        )
    fault: dict[str, str] | None = json.loads(done.stdout)
    if fault is not None:
        fields = {key: of_user(without(text, secrets.values()), submitted) for key, text in fault.items()}
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
