"""Requests to a run's model outside of training, in a child process: only that imports torch.

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
SHOWN_LINES = 20  # at most, of the output of a process that ended by itself


def ask_model(request: Request) -> Iterator[Answer]:
    """Yield the answers as they arrive, the result last. The process ends with the iterator.

    Raises:
        OrchestratorError: the error of the process, of the same class.
    """
    with tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,  # Ctrl-C goes to this process only, which ends the child
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
                stderr.seek(0)
                lines = "\n".join(stderr.read().splitlines()[-SHOWN_LINES:])
                raise OrchestratorError(f"the process with the model ended by itself ({process.returncode}):\n{lines}")
        finally:
            process.kill()
            process.wait()


def checkpoint_to_ask(run_id: str, run_dir: Path, step: int | None) -> Path:
    """The checkpoint of `step`, or the newest, digests checked.

    Raises:
        NotFound: there is no such checkpoint.
        CheckpointCorrupt: its files are missing or changed; the message names the previous good one.
    """
    checkpoint = choose(run_dir / "checkpoints", step)
    if checkpoint is None:
        raise NotFound(
            f"run {run_id} has no checkpoint yet",
            remedy="One is written at its end, when it is paused or stopped, and every checkpoint.every steps.",
        )
    return checkpoint


def store_of(run_id: str, run_dir: Path) -> str:
    """Directory of the run's token store. Raises DataError if it no longer exists."""
    entries = read_entries(run_dir, only=(DataPrepared,))
    prepared = [entry.event.data.store_dir for entry in entries if isinstance(entry.event, DataPrepared)]
    if not prepared or not Path(prepared[-1]).is_dir():
        gone = f"is gone: {prepared[-1]}" if prepared else "was never prepared"
        raise DataError(f"the token store of run {run_id} {gone}", remedy="Name a text instead: --corpus SOURCE.")
    return str(prepared[-1])


def error_of(fault: Fault) -> OrchestratorError:
    """The error of a child process, of the same class."""
    cls = getattr(errors, fault.kind, OrchestratorError)
    error: OrchestratorError = cls(fault.message, remedy=fault.remedy, unchanged=fault.unchanged)
    if isinstance(error, errors.EntrypointError):
        error.traceback = fault.traceback
    return error
