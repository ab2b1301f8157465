"""Questions to a cluster's Scheduler by way of its Jobs API: each a short job, which asks there and prints the answer.

`ask_by_url` is the end out here, `answer` the one in the cluster. An error there is raised here, of the same class.
"""

import json
from typing import Any

from orchestrator import errors
from orchestrator.cluster.calls import ask
from orchestrator.cluster.connection import connect
from orchestrator.cluster.jobs_api import MARK, JobPort
from orchestrator.errors import ClusterUnreachable, OrchestratorError, UsageError
from orchestrator.protocol.codec import from_plain, to_plain
from orchestrator.protocol.messages import Target
from orchestrator.protocol.status import RunStatus
from orchestrator.sampling.sample_ledger import AuditResult
from orchestrator.scheduler.scheduler import get_or_create_scheduler

ANSWER_TIMEOUT_S = 60.0
ANSWERS: dict[str, Any] = {  # what may be asked, and of what type the answer is
    "list": tuple[RunStatus, ...],
    "status": RunStatus,
    "events": list,
    "audit": AuditResult,
    "scale": Target,
    "stage": Target,
    "kill_worker": str,
    "cancel": Target,
    "pause": Target,
}


def ask_by_url(port: JobPort, method: str, *args: Any) -> Any:
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


def refuse_by_url(port: JobPort | None, what: str) -> None:
    """Raise UsageError if the cluster is reached by URL."""
    if port is not None:
        raise UsageError(
            f"{what} is not done by the URL of a Jobs API from Python",
            remedy=f"Call `orchestrator {what} … --address {port.url}`, or use a client in the cluster.",
            unchanged="Nothing was changed.",
        )


def answer(method: str, args_json: str) -> str:
    """Ask the Scheduler from inside the cluster. Returns a line of JSON: the answer, or an error of ours."""
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
