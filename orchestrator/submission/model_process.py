"""Asking a run's model something outside of training, in a process of its own: torch is imported there only.

    for answer in ask_model(Generation(…)):
        ...

Needs run storage, no cluster.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from orchestrator import errors
from orchestrator.checkpoint.read import choose
from orchestrator.errors import DataError, NotFound, OrchestratorError
from orchestrator.protocol.child_process import MODEL_LINES, Answer, Fault, Request
from orchestrator.run_records.data_preparation import DataPrepared
from orchestrator.run_records.run_history import read_entries

MODULE = "orchestrator.inference.process"
SHOWN_LINES = 20  # of what a process said that ended by itself


def ask_model(request: Request) -> Iterator[Answer]:
    """The answers as they come, the result last. The process ends with the iterator.

    Raises:
        OrchestratorError: what the process ran into, as the error that it was there.
    """
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            start_new_session=True,  # Ctrl-C is for us; we end the process
        )
        try:
            assert process.stdin is not None and process.stdout is not None
            with process.stdin as asked:
                asked.write(MODEL_LINES.write(request))
            for line in process.stdout:
                answer: Answer = MODEL_LINES.read(line)
                if isinstance(answer, Fault):
                    raise error_of(answer)
                yield answer
            if process.wait() != 0:
                said.seek(0)
                lines = "\n".join(said.read().splitlines()[-SHOWN_LINES:])
                raise OrchestratorError(f"the process with the model ended by itself ({process.returncode}):\n{lines}")
        finally:
            process.kill()
            process.wait()


def checkpoint_to_ask(run_id: str, run_dir: Path, step: int | None) -> Path:
    """The checkpoint of `step`, or the newest, digests checked.

    Raises:
        NotFound: there is none.
        CheckpointCorrupt: it isn't as it was written; the message names the previous good one.
    """
    checkpoint = choose(run_dir / "checkpoints", step)
    if checkpoint is None:
        raise NotFound(
            f"run {run_id} has no checkpoint yet",
            remedy="One is written at its end, when it is paused or cancelled, and every checkpoint.every steps.",
        )
    return checkpoint


def store_of(run_id: str, run_dir: Path) -> str:
    """Where the run's token store lies. Raises DataError if there is none any more."""
    entries = read_entries(run_dir, only=(DataPrepared,))
    prepared = [entry.event.data.store_dir for entry in entries if isinstance(entry.event, DataPrepared)]
    if not prepared or not Path(prepared[-1]).is_dir():
        gone = f"is gone: {prepared[-1]}" if prepared else "was never prepared"
        raise DataError(f"the token store of run {run_id} {gone}", remedy="Name a text instead: --corpus SOURCE.")
    return str(prepared[-1])


def error_of(fault: Fault) -> OrchestratorError:
    """What a process ran into, as the error that it was there."""
    cls = getattr(errors, fault.kind, OrchestratorError)
    error: OrchestratorError = cls(fault.message, remedy=fault.remedy, unchanged=fault.unchanged)
    if isinstance(error, errors.EntrypointError):
        error.traceback = fault.traceback
    return error
