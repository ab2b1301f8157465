"""User-defined functions, such as a model or a score, which a job names as "package.module:function".

They are imported only from the directory that was submitted with the job: a job file from somebody else can't name
functions of Python or its installed packages, such as `os:system`.
"""

import importlib
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from orchestrator.errors import EntrypointError

PACKAGE = Path(__file__).parent
_from: dict[str, Path] = {}  # directory of each top-level package imported here


class Elsewhere(ImportError):
    """The module exists, but outside the user's directory."""


def place_of(module: str, directory: Path) -> Path:
    """The file of a module, found without running any code.

    Raises:
        ModuleNotFoundError: there is no such module.
        Elsewhere: a link leads out of the directory, or the file belongs to Python or to an installed package.
    """
    importlib.invalidate_caches()  # it may have been written just now
    search, name = [str(directory.absolute())], ""
    found: ModuleSpec | None = None
    for part in module.split("."):
        name = f"{name}.{part}".lstrip(".")
        found = PathFinder.find_spec(part, search)
        if found is None:
            raise ModuleNotFoundError(f"No module named {name!r} in {directory}", name=name)
        search = [f"{parent}/{part}" for parent in search]
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"{module} in {directory} is a directory without code", name=module)
    file = Path(found.origin).resolve()
    if not file.is_relative_to(directory.resolve()):
        raise Elsewhere(f"{module} in {directory} is a link to {file}, outside of it")
    if any(file.is_relative_to(Path(sysconfig.get_path(kind)).resolve()) for kind in ("stdlib", "purelib", "platlib")):
        raise Elsewhere(f"{module} in {directory} is not the user's: it belongs to Python or to an installed package")
    return file


def imported(module: str, directory: Path) -> ModuleType:
    """Import a module from a directory, which is searched first for the module's own imports.

    Raises:
        ModuleNotFoundError, Elsewhere: as `place_of`; or another module of its name is in use.
        Exception: any error that the module raises.
    """
    place_of(module, directory)
    top, root = module.partition(".")[0], directory.absolute()
    if _from.get(top, root) != root:  # another job's, in a process that serves several
        _forget(top)
    _from[top] = root
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    found = importlib.import_module(module)
    file = Path(found.__file__ or "").resolve()
    if not file.is_relative_to(root.resolve()):
        raise Elsewhere(f"{module} in {root} can't be imported: {file} goes by this name already; rename yours")
    return found


def _forget(top: str) -> None:
    with_dot = f"{top}."
    for name in [name for name in sys.modules if name == top or name.startswith(with_dot)]:
        del sys.modules[name]
    left = str(_from.pop(top))
    if left in sys.path and left not in map(str, _from.values()):
        sys.path.remove(left)


def function_of(key: str, entrypoint: str, code_dir: Path) -> Callable[..., Any]:
    """The function that an entrypoint names.

    Args:
        key: of the job file, under which it stands.

    Raises:
        EntrypointError: it can't be imported, or there is none of this name.
    """
    directory, section = code_dir.absolute(), key.rpartition(".")[0]
    module_name, _, name = entrypoint.partition(":")
    try:
        module = imported(module_name, directory)
    except (Exception, SystemExit) as error:
        raise EntrypointError(
            f"{key} {entrypoint} can't be imported: {type(error).__name__}: {error}",
            traceback=_traceback_of(error),
            remedy=f'`python -c "import {module_name}"` must work in {directory}; {section}.code_dir names another. '
            "A package that is missing may be named in the job's pip.",
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        functions = [other for other, value in vars(module).items() if callable(value)]
        nearest = get_close_matches(name, functions, n=1)
        raise EntrypointError(
            f"{key} {entrypoint}: {module.__file__} has no function {name}",
            remedy=f"It must name a function of that module{f'; nearest: {nearest[0]}' if nearest else ''}.",
        )
    return function  # type: ignore[no-any-return]


def place_in_code(function: Any) -> str:
    """File and first line of a function, to begin a message with; empty for one that isn't written in Python."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return "" if code is None else f"{code.co_filename}:{code.co_firstlineno}: "


@contextmanager
def calling_user(what: str) -> Iterator[None]:
    """Turn exceptions of the user's code into EntrypointErrors with its traceback; memory errors pass unchanged."""
    try:
        yield
    except (EntrypointError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which control code doesn't load
            raise
        raise EntrypointError(
            f"{what} raised {type(error).__name__}: {error}", traceback=_traceback_of(error), remedy="Fix your code."
        ) from error


def _traceback_of(error: BaseException) -> str:
    """The error's traceback without the frames above the user's code (ours and importlib's)."""
    frames = error.__traceback__
    while frames is not None and _is_ours(frames):
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames))


def _is_ours(frames: Any) -> bool:
    file: str = frames.tb_frame.f_code.co_filename
    return file.startswith(("<frozen importlib", str(Path(importlib.__file__).parent), f"{PACKAGE}/"))
