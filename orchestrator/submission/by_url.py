"""A job sent to a cluster of which one reaches nothing but its Jobs API: looked at here, submitted there."""

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
from orchestrator.spec.loading import load_job
from orchestrator.submission.user_code import check_places, own_code_of

BEGUN = f"{MARK}{MARK}begun"  # the driver's word that the run is submitted
UNCHANGED = "Nothing was started."


def load_for_elsewhere(job: Path, overrides: Sequence[str]) -> JobSpec:
    """The job, if it could be meant for another machine.

    Raises:
        SpecError, UsageError: as far as can be known here: the job file, where it is, and where its code is.
    """
    spec = load_job(job, overrides)
    if job.is_absolute() or ".." in job.parts:
        raise UsageError(
            f"job file {job} is not in the current directory, which is what is sent to the cluster",
            remedy="Go to the directory that holds it and the code it needs, and name it from there.",
            unchanged=UNCHANGED,
        )
    if not Path(spec.storage).is_absolute():
        raise UsageError(
            f"storage {spec.storage} is relative; a cluster needs an absolute path that all its nodes share",
            remedy="Say storage: /shared/runs in the job file, or --set storage=/shared/runs.",
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
    port: JobsApiClient, job: Path, run_id: str, overrides: Sequence[str], on_said: Callable[[str], object]
) -> tuple[str, int | None]:
    """Send a job and the current directory; returns once the run is submitted there, or refused.

    Args:
        on_said: gets what the driver says on stderr, line by line.

    Returns:
        the id of its job, and the exit code if the run was refused.
    """
    command = ["drive", str(job), "--name", run_id, *(word for text in overrides for word in ("--set", text))]

    def look(line: str) -> bool:
        if line.startswith(MARK) and line not in (OURS, BEGUN):
            on_said(line)
        return line != BEGUN

    return port.start(command, Path.cwd(), run_id, look)


def submit_file(port: JobsApiClient, job: object, name: str | None, overrides: Sequence[str]) -> str:
    """`send` for who has no terminal. Returns the run's name.

    Raises:
        OrchestratorError: what the driver said, of the class that its exit code stands for.
    """
    if not isinstance(job, str | os.PathLike):
        raise UsageError("a job is sent to a URL as a file of the current directory", remedy="Name that file.")
    run_id = name or load_for_elsewhere(Path(job), overrides).name
    said: list[str] = []
    _, refused = send(port, Path(job), run_id, overrides, said.append)
    if refused is not None:
        told = "\n".join(line.lstrip(MARK) for line in said)
        raise of_code(refused)(told.removeprefix("error: "))
    return run_id


# -- Questions to a cluster's Scheduler by way of its Jobs API: each a short job, which asks there and prints the answer

ANSWER_TIMEOUT_S = 60.0
ANSWERS: dict[str, Any] = {  # what may be asked, and of what type the answer is
    "list": tuple[RunStatus, ...],
    "status": RunStatus,
    "events": list,
    "audit": AuditResult,
    "scale": DesiredRunState,
    "stage": DesiredRunState,
    "kill_worker": str,
    "cancel": DesiredRunState,
    "pause": DesiredRunState,
}


def ask_by_url(port: JobsApiClient, method: str, *args: Any) -> Any:
    """What the Scheduler's method returns.

    Raises:
        OrchestratorError: whatever of ours it raised, or the way there.
        UsageError: this can't be asked by URL.
    """
    if method not in ANSWERS:
        refuse_by_url(port, method)
    said: list[str] = []
    code = port.run(["answer", method, json.dumps(args)], said.append)
    lines = [line for line in said if not line.startswith(MARK)]
    if code != 0 or not lines:
        told = "\n".join(line.lstrip(MARK) for line in said)
        raise ClusterUnreachable(f"the cluster at {port.url} gave no answer to {method}: {told}")
    found = json.loads(lines[-1])
    if "error" in found:
        raise _error(**found["error"])
    return from_plain(ANSWERS[method], found["answer"])


def refuse_by_url(port: JobsApiClient | None, what: str) -> None:
    """Raise UsageError if the cluster is reached by URL."""
    if port is not None:
        raise UsageError(
            f"{what} is not done by the URL of a Jobs API from Python",
            remedy=f"Call `orchestrator {what} … --address {port.url}`, or use a client in the cluster.",
            unchanged="Nothing was changed.",
        )


def answer(method: str, args_json: str) -> str:
    """Ask the Scheduler from inside the cluster. Returns a line of JSON: the answer, or an error of ours."""
    from orchestrator.cluster.calls import ask  # and with it Ray, which who asks from outside doesn't need
    from orchestrator.cluster.connection import connect
    from orchestrator.scheduler.scheduler import get_or_create_scheduler

    try:
        connect()
        found = ask(get_or_create_scheduler(), method, *json.loads(args_json), timeout_s=ANSWER_TIMEOUT_S)
    except OrchestratorError as error:
        told = {"message": error.message, "remedy": error.remedy, "unchanged": error.unchanged}
        return json.dumps({"error": {"kind": type(error).__name__, **told}})
    return json.dumps({"answer": to_plain(found)})


def _error(kind: str, message: str, remedy: str, unchanged: str) -> OrchestratorError:
    known = getattr(errors, kind, OrchestratorError)
    made: OrchestratorError = known(message, remedy=remedy, unchanged=unchanged)
    return made
