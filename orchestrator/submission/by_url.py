"""Submission to a cluster that is reachable only by its Jobs API: jobs are checked here and submitted there."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orchestrator import errors
from orchestrator.cluster.jobs_api import MARK, OURS, JobsApiClient
from orchestrator.errors import ClusterUnreachable, OrchestratorError, UsageError, of_code
from orchestrator.protocol.codec import from_plain, to_plain
from orchestrator.protocol.messages import DesiredRunState
from orchestrator.protocol.status import RunStatus
from orchestrator.sampling.sample_ledger import AuditResult
from orchestrator.spec.job import JobSpec
from orchestrator.spec.job_file.loading import load_job
from orchestrator.submission.user_code import check_places, own_code_of
from orchestrator.submission.waiting import WAITING

BEGUN = f"{MARK}{MARK}begun"  # the driver prints it once the run is submitted
UNCHANGED = "Nothing was started."


def load_for_elsewhere(job: Path, overrides: Sequence[str]) -> JobSpec:
    """Load a job that is to be sent to another machine.

    Raises:
        SpecError, UsageError: the job file has mistakes, or its path, storage or code is of no use on that machine.
    """
    spec = load_job(job, overrides)
    if job.is_absolute() or ".." in job.parts:
        raise UsageError(
            f"job file {job} is not in the current directory, which is what is sent to the cluster",
            remedy="Go to the directory that holds it and the code it needs, and name it from there.",
            unchanged=UNCHANGED,
        )
    if "://" in spec.storage:
        raise UsageError(
            f"storage {spec.storage} is a bucket; what is sent by the URL of a Jobs API is kept in a directory there",
            remedy="Submit inside the cluster, or set storage to a directory that all nodes share.",
            unchanged=UNCHANGED,
        )
    if not Path(spec.storage).is_absolute():
        raise UsageError(
            f"storage {spec.storage} is relative; a cluster needs an absolute path that all its nodes share",
            remedy="Set storage: /shared/runs in the job file, or pass --set storage=/shared/runs.",
            unchanged=UNCHANGED,
        )
    if spec.signing_key == "auto":
        raise UsageError(
            "signing_key auto is a key of this machine's user, and the job is signed in the cluster",
            remedy="Name a key that its head has: file:PATH or env:NAME.",
            unchanged=UNCHANGED,
        )
    for key, name, code_dir in own_code_of(spec):
        if Path(code_dir).is_absolute() or ".." in Path(code_dir).parts or code_dir.startswith("~"):
            raise UsageError(
                f"{key} {name} comes from {code_dir}, which is not in the current directory, and that is what is sent",
                remedy="Go to a directory that holds the job file and the code, and name code_dir from there.",
                unchanged=UNCHANGED,
            )
    check_places(spec)
    return spec


def send(
    port: JobsApiClient,
    job: Path,
    run_id: str,
    overrides: Sequence[str],
    timeout_s: float | None,
    on_said: Callable[[str], object],
) -> tuple[str, int | None]:
    """Send a job and the current directory. Returns once the run is submitted in the cluster, or refused.

    Args:
        timeout_s: as in `OrchestratorClient.submit`; the time runs in the cluster.
        on_said: called with each line that the driver writes to stderr.

    Returns:
        the id of the Ray job, and the exit code if the run was refused.
    """
    command = ["drive", str(job), "--name", run_id, *(word for text in overrides for word in ("--set", text))]
    if timeout_s is not None:
        command += ["--timeout", str(timeout_s)]

    def look(line: str) -> bool:
        if line.startswith(MARK) and line not in (OURS, BEGUN):
            on_said(line)
        return line != BEGUN

    return port.start(command, Path.cwd(), run_id, look, timeout_s or 0.0)


def submit_file(
    port: JobsApiClient, job: object, name: str | None, overrides: Sequence[str], timeout_s: float | None
) -> str:
    """`send` for callers without a terminal. Returns the run's name.

    Raises:
        OrchestratorError: the driver's message, of the class that its exit code stands for.
    """
    if not isinstance(job, str | os.PathLike):
        raise UsageError("a job is sent to a URL as a file of the current directory", remedy="Name that file.")
    run_id = name or load_for_elsewhere(Path(job), overrides).name
    lines: list[str] = []
    _, refused = send(port, Path(job), run_id, overrides, timeout_s, lines.append)
    if refused is not None:
        texts = [line.lstrip(MARK) for line in lines]
        message = "\n".join(text for text in texts if not text.startswith(WAITING))
        raise of_code(refused)(message.removeprefix("error: "))
    return run_id


# -- Calls to a cluster's Scheduler by its Jobs API: each is a short job, which makes the call and prints the answer

ANSWER_TIMEOUT_S = 60.0
ANSWERS: dict[str, Any] = {  # methods that may be called, and the types of their answers
    "list": tuple[RunStatus, ...],
    "status": RunStatus,
    "events": list,
    "audit": AuditResult,
    "scale": DesiredRunState,
    "stage": DesiredRunState,
    "checkpoint": DesiredRunState,
    "kill_worker": str,
    "set_priority": int,
    "stop": DesiredRunState,
    "pause": DesiredRunState,
    "remove": str,
}


def ask_by_url(port: JobsApiClient, method: str, *args: Any) -> Any:
    """Call a method of the Scheduler and return its result.

    Raises:
        OrchestratorError: raised by the method, or on the way to it.
        UsageError: the method can't be called by URL.
    """
    if method not in ANSWERS:
        refuse_by_url(port, method)
    output: list[str] = []
    code = port.run(["answer", method, json.dumps(args)], output.append)
    lines = [line for line in output if not line.startswith(MARK)]
    if code != 0 or not lines:
        text = "\n".join(line.lstrip(MARK) for line in output)
        raise ClusterUnreachable(f"the cluster at {port.url} gave no answer to {method}: {text}")
    found = json.loads(lines[-1])
    if "error" in found:
        raise _error(**found["error"])
    return from_plain(ANSWERS[method], found["answer"])


def refuse_by_url(port: JobsApiClient | None, what: str) -> None:
    """Raise UsageError if the cluster is reached by URL."""
    if port is not None:
        raise UsageError(
            f"{what} is not available from Python by the URL of a Jobs API",
            remedy=f"Call `orchestrator {what} … --address {port.url}`, or use a client in the cluster.",
            unchanged="Nothing was changed.",
        )


def answer(method: str, args_json: str) -> str:
    """Call the Scheduler from inside the cluster. Returns a line of JSON: the answer, or an OrchestratorError."""
    from orchestrator.cluster.connection import connect  # imports Ray, which callers outside don't need
    from orchestrator.scheduler.scheduler import Scheduler
    from orchestrator.scheduler.scheduler_actor import get_or_create_scheduler

    try:
        connect()
        scheduler = get_or_create_scheduler().within(ANSWER_TIMEOUT_S)
        found = scheduler.ask(getattr(Scheduler, method), *json.loads(args_json))
    except OrchestratorError as error:
        fields = {"message": error.message, "remedy": error.remedy, "unchanged": error.unchanged}
        return json.dumps({"error": {"kind": type(error).__name__, **fields}})
    return json.dumps({"answer": to_plain(found)})


def _error(kind: str, message: str, remedy: str, unchanged: str) -> OrchestratorError:
    known = getattr(errors, kind, OrchestratorError)
    made: OrchestratorError = known(message, remedy=remedy, unchanged=unchanged)
    return made
