"""Calls to actors that raise the package's own errors.

Ray wraps an actor's exception into an error of a class made at run time. Callers here get the original exception.
"""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
)

from orchestrator.errors import ClusterUnreachable, OrchestratorError

F = TypeVar("F", bound=Callable[..., Any])

ONCE = "is_called_once"  # attribute of methods

KILLED = "connection error code 2"  # Ray's words for a process whose socket was closed without notice

NOT_STARTED = "because of an error raised in its creation task"  # Ray's words for an actor whose start failed
NODE_DIED = "its node has died"  # Ray's words for the failure of a whole node


def once(method: F) -> F:
    """Mark a method whose call isn't repeated when its answer is lost, since a second one would do something more."""
    setattr(method, ONCE, True)
    return method


def ask(
    handle: ActorHandle[Any], method: str, *args: Any, timeout_s: float = 30.0, repeats: bool = True, **kwargs: Any
) -> Any:
    """The result of the actor's method.

    Args:
        repeats: the call is repeated while the actor is being restarted.

    Raises:
        OrchestratorError: raised by the method.
        ClusterUnreachable: the actor has ended, or did not answer within `timeout_s`.
    """
    deadline_s = time.monotonic() + timeout_s
    while True:
        left_s = max(0.0, deadline_s - time.monotonic())
        try:
            return ray.get(getattr(handle, method).remote(*args, **kwargs), timeout=left_s)
        except ActorUnavailableError as error:
            if not repeats:
                raise ClusterUnreachable(
                    f"the answer to {method} was lost: {reason_of(error)}",
                    remedy="It may have been done: check that with `orchestrator events RUN` before you repeat it.",
                ) from error
            if left_s == 0.0:
                raise _own_error(error, f"call of {method}", timeout_s) from error
            time.sleep(0.1)
        except (RayTaskError, RayActorError, GetTimeoutError) as error:
            raise _own_error(error, f"call of {method}", timeout_s) from error


def reason_of(error: BaseException) -> str:
    """Why a call failed, in one line: the callee's exception, or how its process ended."""
    if isinstance(error, RayTaskError) and error.cause is not None:
        known = isinstance(error.cause, OrchestratorError)
        return str(error.cause) if known else f"{type(error.cause).__name__}: {error.cause}"
    if isinstance(error, ActorUnavailableError):  # its text describes a single call
        return "its connections broke, and it is not known yet whether its process or its whole host has ended"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and NOT_STARTED in lines[0]:  # a traceback follows
        return f"it could not be started: {lines[-1]}"
    table = ("class_name:", "actor_id:", "pid:", "name:", "namespace:", "ip:")
    detail = " ".join(line for line in lines if not line.startswith(table))
    detail = detail.partition(" Some common causes")[0].rpartition("Worker exit detail: ")[2]
    if KILLED in detail:
        return "its process ended suddenly: killed from outside, out of memory, or crashed"
    return detail or type(error).__name__


def has_ended(error: BaseException) -> bool:
    """Whether a call failed because its actor has ended for good. One with restarts has if it raised an error while it
    started: Ray starts it no more."""
    return isinstance(error, ActorDiedError)


def cause_of(error: BaseException) -> str:
    """Class of the failure that ended a process, as far as Ray reports it; see `policy.health.budget`."""
    if isinstance(error, OutOfMemoryError):
        return "out_of_memory"
    if isinstance(error, ActorUnavailableError):
        return "network"
    if getattr(error, "preempted", False):
        return "preemption"
    return "node" if NODE_DIED in str(error) else "worker"


def _own_error(error: Exception, what: str, timeout_s: float) -> Exception:
    """The package's own error for `error`; an error that indicates a bug is returned unchanged."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, OrchestratorError):
        return error.cause
    if isinstance(error, GetTimeoutError):
        return ClusterUnreachable(f"{what} had no answer within {timeout_s:.0f} s")
    if isinstance(error, RayActorError):
        return ClusterUnreachable(f"{what} failed: {reason_of(error)}")
    return error
