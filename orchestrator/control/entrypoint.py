"""A user's own model tried out before its run is submitted, in a process of its own: control never imports torch."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

from orchestrator.errors import EntrypointError
from orchestrator.spec.job import JobSpec

TIMEOUT_S = 120.0
REHEARSAL = "orchestrator.model.rehearsal"
UNCHANGED = "Nothing was started."


def check_entrypoint(job: JobSpec) -> None:
    """Import and build the job's own model as a worker would; nothing for a job without one.

    Args:
        job: with absolute paths.

    Raises:
        EntrypointError: it can't be trained. Carries the traceback of the user's code.
    """
    if job.model.entrypoint is not None:
        _rehearse(job.model_dump_json(by_alias=True))


@cache  # a command checks a job before it looks for a cluster, and again as it submits it
def _rehearse(job_json: str) -> None:
    job = JobSpec.model_validate_json(job_json)
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    try:
        # -P: the current directory is searched only where the job says so, as in a worker.
        done = subprocess.run(
            [sys.executable, "-P", "-m", REHEARSAL],
            input=job_json,
            capture_output=True,
            text=True,
            env={**os.environ, **job.envs, "PYTHONPATH": path},
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise EntrypointError(
            f"model.entrypoint {job.model.entrypoint} was neither built nor refused within {TIMEOUT_S:.0f} s",
            remedy="It is imported, built and run on a row of tokens: let none of it wait or compute for long.",
            unchanged=UNCHANGED,
        ) from None
    if done.returncode != 0:
        raise EntrypointError(
            f"the process that built model.entrypoint {job.model.entrypoint} ended with code {done.returncode}",
            traceback=done.stderr,
            unchanged=UNCHANGED,
        )
    fault = json.loads(done.stdout)
    if fault is not None:
        raise EntrypointError(**fault, unchanged=UNCHANGED)
