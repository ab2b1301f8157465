"""Typed calls to actors: the only module that uses Ray's handles and the names of methods.

    get_or_create_scheduler().ask(Scheduler.scale, "my-run", 3)

Methods are taken from the class or protocol that defines them, so a type checker knows arguments and result, and an
editor finds the definition across the process border.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import ray
from ray.actor import ActorHandle

from orchestrator.cluster.calls import ONCE, ask

A = TypeVar("A")  # class, or protocol, of the object that answers
B = TypeVar("B")
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Remote(Generic[A]):
    """An object in another process.

    Args:
        handle: of the Ray actor.
        is_hosted: the actor is a `Host`, which forwards calls to the object.
        timeout_s: how long `ask` waits for an answer, also while the actor is being restarted.
    """

    handle: ActorHandle[Any]
    is_hosted: bool = False
    timeout_s: float = 30.0

    def within(self, timeout_s: float) -> "Remote[A]":
        """The same object with another timeout."""
        return replace(self, timeout_s=timeout_s)

    def hosted(self) -> "Remote[B]":
        """The object in this `Host`, of the type that the caller declares."""
        return Remote(self.handle, is_hosted=True, timeout_s=self.timeout_s)

    def kill(self) -> None:
        """Kill the process. Ray doesn't restart it."""
        ray.kill(self.handle, no_restart=True)

    def ask(self, method: Callable[Concatenate[A, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The result of the method. Unless that is marked `once`, the call is repeated while the actor is restarted.

        Raises:
            OrchestratorError: raised by the method.
            ClusterUnreachable: the actor has ended, or did not answer in time.
        """
        name, given = self._addressed(method.__name__, args)
        answer: R = ask(
            self.handle, name, *given, timeout_s=self.timeout_s, repeats=not hasattr(method, ONCE), **kwargs
        )
        return answer

    def send(self, method: Callable[Concatenate[A, P], R], *args: P.args, **kwargs: P.kwargs) -> "ray.ObjectRef[R]":
        """Call without waiting. Returns Ray's reference of the result."""
        name, given = self._addressed(method.__name__, args)
        ref: ray.ObjectRef[R] = getattr(self.handle, name).remote(*given, **kwargs)
        return ref

    def _addressed(self, name: str, args: tuple[Any, ...]) -> tuple[str, tuple[Any, ...]]:
        return ("call", (name, *args)) if self.is_hosted else (name, args)
