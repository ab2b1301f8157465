"""Script that Ray begins a worker's process with on a local cluster, in place of its own `setup_worker.py`.

That one imports all of Ray to set some environment variables, and then becomes another process, which imports it again:
0.3 s of an idle processor for each process of a run. Whatever needs more than variables is left to it. Run by its path,
this imports nothing of the package.
"""

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CONTEXT, LANGUAGE = "--serialized-runtime-env-context=", "--language="
PLAIN_PATH = r"[A-Za-z0-9_@%+=:,./-]+"  # means the same to a shell, by which Ray's own script goes


def context_of(arguments: Sequence[str]) -> dict[str, Any]:
    """Ray's description of the process: its variables, its interpreter, and what else it needs."""
    given = [argument.removeprefix(CONTEXT) for argument in arguments if argument.startswith(CONTEXT)]
    context: dict[str, Any] = json.loads(given[-1]) if given and given[-1] else {}
    return context


def is_plain(context: Mapping[str, Any], arguments: Sequence[str]) -> bool:
    """Whether the process needs nothing but variables, whose values refer to no others."""
    is_python = f"{LANGUAGE}PYTHON" in arguments
    others = [key for key, value in context.items() if value and key not in ("env_vars", "py_executable")]
    values = [str(value) for value in (context.get("env_vars") or {}).values()]
    python = context.get("py_executable") or sys.executable
    return is_python and not others and not any("$" in v for v in values) and bool(re.fullmatch(PLAIN_PATH, python))


def main() -> None:
    arguments = sys.argv[1:]
    context = context_of(arguments)
    if not is_plain(context, arguments):
        ray = find_spec("ray")
        assert ray is not None and ray.origin is not None
        setup = Path(ray.origin).parent / "_private" / "workers" / "setup_worker.py"
        os.execv(sys.executable, [sys.executable, str(setup), *arguments])
    os.environ.update(context.get("env_vars") or {})
    python = context.get("py_executable") or sys.executable
    worker = [argument for argument in arguments if not argument.startswith((CONTEXT, LANGUAGE))]
    os.execvp(python, [python, *worker])


if __name__ == "__main__":
    main()
