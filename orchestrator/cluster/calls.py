"""Calls to actors, with their errors as our own.

Ray wraps what an actor raises into an error of a class made at run time. Callers here get the original back.
"""

import time
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, OutOfMemoryError, RayActorError, RayTaskError

from orchestrator.cluster.actors import Handle
from orchestrator.errors import ClusterUnreachable, OrchestratorError

KILLED = "connection error code 2"  # Ray's words for a process whose socket was closed without a good-bye

NODE_DIED = "its node has died"  # Ray's words for the loss of a whole node


def ask(handle: Handle, method: str, *args: Any, timeout_s: float = 30.0, repeat: bool = True, **kwargs: Any) -> Any:
    """What the actor's method returns.

    Args:
        repeat: ask again while the actor is being restarted. Not for what must not be done twice.

    Raises:
        OrchestratorError: whatever of ours the method raised.
        ClusterUnreachable: the actor has ended, or did not answer within `timeout_s`.
    """
    deadline_s = time.monotonic() + timeout_s
    while True:
        left_s = max(0.0, deadline_s - time.monotonic())
        try:
            return ray.get(getattr(handle, method).remote(*args, **kwargs), timeout=left_s)
        except ActorUnavailableError as error:
            if not repeat or left_s == 0.0:
                raise _own_error(error, f"call of {method}", timeout_s) from error
            time.sleep(0.1)
        except (RayTaskError, RayActorError, GetTimeoutError) as error:
            raise _own_error(error, f"call of {method}", timeout_s) from error


def reason_of(error: BaseException) -> str:
    """Why a call failed, in one line: what the callee raised, or how its process ended."""
    if isinstance(error, RayTaskError) and error.cause is not None:
        known = isinstance(error.cause, OrchestratorError)
        return str(error.cause) if known else f"{type(error.cause).__name__}: {error.cause}"
    if isinstance(error, ActorUnavailableError):  # whose text is about one call
        return "its connections broke, and nothing tells yet whether its process or its whole host has ended"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    table = ("class_name:", "actor_id:", "pid:", "name:", "namespace:", "ip:")
    told = " ".join(line for line in lines if not line.startswith(table))
    told = told.partition(" Some common causes")[0].rpartition("Worker exit detail: ")[2]
    if KILLED in told:
        return "its process ended suddenly: killed from outside, out of memory, or crashed"
    return told or type(error).__name__


def cause_of(error: BaseException) -> str:
    """The class of failure that the end of a process belongs to, as far as Ray tells; see `policy.failures`."""
    if isinstance(error, OutOfMemoryError):
        return "out_of_memory"
    if isinstance(error, ActorUnavailableError):
        return "network"
    if getattr(error, "preempted", False):
        return "preemption"
    return "node" if NODE_DIED in str(error) else "worker"


def _own_error(error: Exception, what: str, timeout_s: float) -> Exception:
    """The error of ours that `error` stands for; an error that is a bug stays itself."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, OrchestratorError):
        return error.cause
    if isinstance(error, GetTimeoutError):
        return ClusterUnreachable(f"{what} had no answer within {timeout_s:.0f} s")
    if isinstance(error, RayActorError):
        return ClusterUnreachable(f"{what} failed: {reason_of(error)}")
    return error
