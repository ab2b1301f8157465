"""Calls to storage as functions and arguments, so that another process can make them."""

from collections.abc import Callable, Iterable
from typing import ParamSpec, Protocol, TypeVar

from orchestrator.storage.objects import Objects

P = ParamSpec("P")
R = TypeVar("R")


class Caller(Protocol):
    """Makes a call and returns its result. It may be called from any thread."""

    def __call__(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R: ...


def call_here(function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """The `Caller` of processes that may wait for storage."""
    return function(*args, **kwargs)


class CalledObjects:
    """Objects whose calls a `Caller` makes.

    Args:
        objects: the storage; it must be picklable if another process makes the calls.
    """

    def __init__(self, objects: Objects, caller: Caller) -> None:
        self._objects, self._caller = objects, caller

    def create(self, key: str, data: bytes) -> bytes:
        return self._caller(self._objects.create, key, data)

    def get(self, key: str) -> bytes:
        return self._caller(self._objects.get, key)

    def names(self, folder: str) -> tuple[str, ...]:
        return self._caller(self._objects.names, folder)

    def delete(self, keys: Iterable[str]) -> None:
        self._caller(self._objects.delete, tuple(keys))
