"""Parts of a training loop, given to `ElasticTrainer` as functions, as settings that override keys of a job.

Other processes import the functions by name, so they must be defined at the top of a file. That of the script itself is
imported too, which must not begin a run: what it does stands behind `if __name__ == "__main__"`.
"""

import ast
import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from orchestrator.errors import UsageError
from orchestrator.spec.job_file.overrides import Setting

Part = Callable[..., Any]


def settings_of_parts(
    task: Part | str | None, model: Part | None, datasets: Part | str | os.PathLike[str] | None
) -> Iterator[Setting]:
    """Settings of the parts that are given. Arguments as in `ElasticTrainer`.

    Raises:
        UsageError: a part is no function that another process can import.
    """
    if isinstance(task, str):
        yield Setting(("task", "name"), task, f"task={task!r}")
    elif task is not None:
        yield from _named("task", "task", task)
    if model is not None:
        yield from _named("model", "model", model)
    if isinstance(datasets, str | os.PathLike):
        yield Setting(("data", "source"), os.fspath(datasets), f"datasets={os.fspath(datasets)!r}")
    elif datasets is not None:
        yield from _named("datasets", "data", datasets)


def _named(argument: str, section: str, function: Part) -> Iterator[Setting]:
    """The function as `entrypoint` and `code_dir` of a section."""
    name = getattr(function, "__qualname__", "")
    module = inspect.getmodule(function)
    written = f"{argument}={name or repr(function)}"
    file = None if module is None else getattr(module, "__file__", None)
    if module is None or file is None or not name.isidentifier() or getattr(module, name, None) is not function:
        raise UsageError(
            f"{written} is no function that another process can import",
            remedy=f'Define it with `def` at the top of a file, or name it in the job: {section}: {{entrypoint: "file:'
            'function"}.',
            unchanged="Nothing was started.",
        )
    path = Path(file).absolute()
    if module.__name__ == "__main__":
        _check_guard(path, written)
        dotted, root = path.stem, path.parent
    else:
        dotted, root = module.__name__, path.parents[module.__name__.count(".") + (path.name == "__init__.py")]
    yield Setting((section, "entrypoint"), f"{dotted}:{name}", written)
    yield Setting((section, "code_dir"), str(root), written)


def _check_guard(script: Path, written: str) -> None:
    """Raise UsageError if the script would begin a run wherever it is imported."""
    statements = ast.parse(script.read_text(encoding="utf-8")).body
    guards = ('__name__ == "__main__"', '"__main__" == __name__')
    same = {ast.dump(ast.parse(guard, mode="eval").body) for guard in guards}
    if not any(isinstance(s, ast.If) and ast.dump(s.test) in same for s in statements):
        raise UsageError(
            f"{written} is defined in {script.name}, which workers import too: it would begin a run there",
            remedy='Put what the script does behind `if __name__ == "__main__":`, or the function into another file.',
            unchanged="Nothing was started.",
        )
