"""What an error of the training thread is called in a report."""

import torch
from torch.distributed import DistError

from orchestrator.errors import EntrypointError
from orchestrator.model.user_model import raised_by_forward

NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"  # torch's words on a CPU, in a plain RuntimeError


class GenerationAborted(RuntimeError):
    """The controller has ended the generation: somebody in it is lost."""


class LossExploded(RuntimeError):
    """A step's loss tells that it must be undone, and its batch left out."""


class StateCorrupted(RuntimeError):
    """This process's memory has changed by itself."""


class DigestMismatch(RuntimeError):
    """The state that a move has brought isn't what the run had then."""


def kind_of(error: Exception) -> str:
    """The word for it that WorkerError has."""
    if isinstance(error, LossExploded):
        return "numeric"
    if isinstance(error, StateCorrupted):
        return "corrupted"
    if isinstance(error, DigestMismatch):
        return "doubtful"
    # Also where it came through a user's module, on its way from our MoE layer.
    if isinstance(error, GenerationAborted) or _is_peer_loss(error):
        return "peer_lost"
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or NO_MEMORY in str(error):
        return "out_of_memory"
    return "user_error" if isinstance(error, EntrypointError) or raised_by_forward(error) else "internal"


def _is_peer_loss(error: Exception) -> bool:
    """gloo and nccl report a lost peer as a RuntimeError that names their transport; a lost store has its own class."""
    words = ("connection closed by peer", "connection reset", "gloo", "timed out", "nccl", "broken pipe")
    told = isinstance(error, RuntimeError) and any(w in str(error).lower() for w in words)
    return told or isinstance(error, DistError)
