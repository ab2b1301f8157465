"""Calls to actors, with their errors as our own.

Ray wraps what an actor raises into an error of a class made at run time. Callers here get the original back.
"""

from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from orchestrator.control.host import Handle
from orchestrator.errors import ClusterUnreachable, OrchestratorError


def ask(handle: Handle, method: str, *args: Any, timeout_s: float = 30.0, **kwargs: Any) -> Any:
    """What the actor's method returns.

    Raises:
        OrchestratorError: whatever of ours the method raised.
        ClusterUnreachable: the actor has ended, or did not answer within `timeout_s`.
    """
    try:
        return ray.get(getattr(handle, method).remote(*args, **kwargs), timeout=timeout_s)
    except (RayTaskError, RayActorError, GetTimeoutError) as error:
        raise own_error(error, f"call of {method}", timeout_s) from error


def own_error(error: BaseException, what: str, timeout_s: float = 0.0) -> Exception:
    """The error of ours that `error` stands for, or the best description of it."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, OrchestratorError):
        return error.cause
    if isinstance(error, GetTimeoutError):
        return ClusterUnreachable(f"{what} had no answer within {timeout_s:.0f} s")
    if isinstance(error, RayActorError):
        return ClusterUnreachable(f"{what} failed: {end_of(error)}")
    return error if isinstance(error, Exception) else RuntimeError(str(error))


def end_of(error: BaseException) -> str:
    """How a process ended, in one line: Ray's text without its table of ids."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    table = ("class_name:", "actor_id:", "pid:", "name:", "namespace:", "ip:")
    told = " ".join(line for line in lines if not line.startswith(table))
    return told or type(error).__name__
