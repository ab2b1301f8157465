"""Errors of the training thread, and their kinds in a report."""

import gc
import traceback
from pathlib import Path

import torch
from torch.distributed import DistError

from orchestrator.errors import CheckpointCorrupt, EntrypointError
from orchestrator.model.user_model import raised_by_forward
from orchestrator.protocol.worker_report import CHECKPOINT_CORRUPT, WorkerError
from orchestrator.user_code import PACKAGE

CORRUPTED = "corrupted"
TORCH = f"{Path(torch.__file__).parent}/"
COLLECTIVES = (f"{TORCH}distributed/", f"{PACKAGE}/")  # their code, and ours which calls them
NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"  # torch's message on a CPU, in a plain RuntimeError


class AbortedGeneration(RuntimeError):
    """The controller has ended the generation after the failure of a worker."""


class SumNotProven(RuntimeError):
    """The result of an all-reduce isn't the sum over all ranks: it was aborted."""


class LossExploded(RuntimeError):
    """A step's loss requires that the step be undone and its batch skipped."""


class StateCorrupted(RuntimeError):
    """This process's memory has changed without a write."""


class OtherModel(CheckpointCorrupt):
    """A checkpoint that belongs to another model: other workers would fail in the same way."""


class DigestMismatch(RuntimeError):
    """The state after a transition differs from the one recorded for its step."""


def kind_of(error: Exception, passed_user: bool = False) -> str:
    """The error's kind, as in `WorkerError`.

    Args:
        passed_user: it came through the user's code.
    """
    if isinstance(error, EntrypointError) and isinstance(error.__cause__, Exception):
        # The user's code may only have passed it on: a peer that was lost in our MoE layer, or a GPU.
        return kind_of(error.__cause__, passed_user=True)
    if isinstance(error, LossExploded):
        return "numeric"
    if isinstance(error, StateCorrupted | torch.AcceleratorError):  # after the latter a process can't use its GPU
        return CORRUPTED
    if isinstance(error, DigestMismatch):
        return "doubtful"
    if isinstance(error, CheckpointCorrupt) and not isinstance(error, OtherModel):
        return CHECKPOINT_CORRUPT
    passed_user = passed_user or raised_by_forward(error)
    if isinstance(error, AbortedGeneration | SumNotProven):
        return "peer_lost"
    if _is_peer_loss(error) and not (passed_user and _began_in_user_code(error)):
        return "peer_lost"
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or NO_MEMORY in str(error):
        return "out_of_memory"
    return "user_error" if passed_user or isinstance(error, EntrypointError) else "internal"


def failure_of(error: Exception, what: str = "") -> WorkerError:
    """The error as a report has it, its message behind `what`."""
    return WorkerError(kind_of(error), f"{what}{error}", "".join(traceback.format_exception(error)))


def free_peers(error: BaseException) -> None:
    """Close connections that peers may be blocked on. gloo closes them only once nothing refers to its groups, not even
    the frames of an error."""
    cause: BaseException | None = error
    while cause is not None:
        cause.__traceback__ = None
        cause = cause.__context__
    gc.collect()


def _is_peer_loss(error: Exception) -> bool:
    """gloo and nccl report a failed peer as a RuntimeError that names them; a failed store has its own class."""
    words = ("connection closed by peer", "connection reset", "gloo", "timed out", "nccl", "broken pipe")
    is_named = isinstance(error, RuntimeError) and any(w in str(error).lower() for w in words)
    return is_named or isinstance(error, DistError)


def _began_in_user_code(error: Exception) -> bool:
    """Whether the user's code, or a package that it calls, raised it: no collective did, neither ours nor torch's."""
    for frame, _ in reversed([*traceback.walk_tb(error.__traceback__)]):
        file = frame.f_code.co_filename
        if file.startswith(COLLECTIVES):
            return False
        if not file.startswith((TORCH, "<")):  # torch calls the layers below it, and makes code of its own
            return True
    return False
