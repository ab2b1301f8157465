"""Process that tries a job's own model, task, rows and callbacks before it is submitted.

    python -m orchestrator.worker.check_user_code < job.json      # writes a line of JSON: null, or the fault

`orchestrator.submission.user_code` starts it: control code never imports torch.
"""

import json
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from orchestrator.callback import made
from orchestrator.data.rows.prepare_rows import first_rows
from orchestrator.engine.optim.lr_schedule import learning_rate
from orchestrator.errors import CheckpointCorrupt, DataError, EntrypointError, UsageError
from orchestrator.model.factory import catalogue
from orchestrator.model.tasks.all_tasks import task_of
from orchestrator.model.trial.dry_run import is_small, rehearse
from orchestrator.requirements import use_requirements
from orchestrator.spec.job import JobSpec
from orchestrator.worker.transition.transformers_files import TransformersFiles

MOST_STEPS = 1000  # whose learning rates are asked for


@dataclass(frozen=True)
class DryRunFault:
    """What is wrong with a job's own code, serialized for the calling process. Fields as in EntrypointError."""

    message: str
    remedy: str
    traceback: str


def fault_of(job: JobSpec) -> DryRunFault | None:
    """The first fault that would keep the job's model from being trained, as far as this process can check."""
    vocab_size = job.num_outputs()
    try:
        for step in np.linspace(0, job.train.max_steps - 1, MOST_STEPS).astype(int).tolist():
            learning_rate(job.train, step)
        for callback in job.callbacks:
            made(callback)
        rows = [] if job.has_tokens else first_rows(job, 2)
        task = task_of(job.task, job.data_format)
        if job.model.init_from is not None and not job.model.is_native:
            TransformersFiles(job.model, Path(job.model.init_from)).check()
        params, _ = catalogue(job.model, vocab_size)
        if job.has_own_code and is_small(params):
            rehearse(job, vocab_size, task, torch.device("cpu"), rows)
    except EntrypointError as error:
        return DryRunFault(error.message, error.remedy, error.traceback)
    except (DataError, CheckpointCorrupt, UsageError) as error:
        return DryRunFault(error.message, error.remedy, "")
    return None


def main() -> None:
    job = JobSpec.model_validate_json(sys.stdin.read())
    with redirect_stdout(sys.stderr):  # keep the user code's prints out of the answer
        use_requirements(job.pip)
        fault = fault_of(job)
    print(json.dumps(None if fault is None else vars(fault)))


if __name__ == "__main__":
    main()
