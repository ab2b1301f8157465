"""What Ray starts a worker's process with, in place of Ray's own `setup_worker.py`: that imports all of Ray to set some
environment variables, and then becomes another process, which imports it again."""

import json
import os
import shlex
import sys

CONTEXT = "--serialized-runtime-env-context="

if __name__ == "__main__":
    given = [argument.removeprefix(CONTEXT) for argument in sys.argv if argument.startswith(CONTEXT)]
    context = json.loads(given[-1] if given and given[-1] else "{}")
    assert not context.get("command_prefix"), context  # it would need a shell
    os.environ.update(context.get("env_vars") or {})
    python = shlex.split(context.get("py_executable") or sys.executable)
    worker = [argument for argument in sys.argv[1:] if not argument.startswith((CONTEXT, "--language="))]
    os.execvp(python[0], [*python, *worker])
