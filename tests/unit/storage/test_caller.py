from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from orchestrator.storage.caller import CalledObjects, call_here
from orchestrator.storage.directory import DirectoryObjects

P = ParamSpec("P")
R = TypeVar("R")


def test_every_call_of_called_objects_is_made_by_the_caller(tmp_path: Path) -> None:
    made: list[str] = []

    def caller(function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        made.append(function.__name__)
        return call_here(function, *args, **kwargs)

    objects = CalledObjects(DirectoryObjects(tmp_path), caller)
    assert objects.create("a/b", b"1") == objects.get("a/b") == b"1"
    assert objects.names("a") == ("b",)
    objects.delete(name for name in ("a/b",))
    assert made == ["create", "get", "names", "delete"] and DirectoryObjects(tmp_path).names("a") == ()
