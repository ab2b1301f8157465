"""Child processes of `orchestrator.torch_process` that begin with torch imported, which takes 3 s of a core:
`Forking` has what that module uses of `subprocess`. Each is a process of its own all the same, with its own input,
output, environment and end."""

import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import IO, Any

from tests.support import forks


class ForkedModule:
    """`subprocess.Popen` of `python -P -m MODULE …`."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdin: int | IO[Any],
        stdout: IO[Any],
        stderr: IO[Any],
        env: Mapping[str, str],
        pass_fds: Sequence[int] = (),
        **options: Any,
    ) -> None:
        python, safe_path, as_module, *argv = command
        assert (python, safe_path, as_module) == (sys.executable, "-P", "-m")
        self.stdin: IO[str] | None = None
        if stdin == subprocess.PIPE:
            reading, writing = os.pipe()
            self.stdin = os.fdopen(writing, "w")
        else:
            assert not isinstance(stdin, int)
            reading = os.dup(stdin.fileno())
        passed = {0: reading, 1: os.dup(stdout.fileno()), 2: os.dup(stderr.fileno())}
        passed |= {number: os.dup(number) for number in pass_fds}
        held = {number: Connection(copy) for number, copy in passed.items()}
        self._process = forks.start(_run, held, argv, dict(env), os.getcwd())
        for connection in held.values():
            connection.close()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a forked module", timeout or 0.0)
        return self.returncode

    def kill(self) -> None:
        if self.returncode is None and self._process.pid is not None:
            os.kill(self._process.pid, signal.SIGKILL)


class Forking:
    """In place of the module `subprocess`."""

    Popen = ForkedModule
    PIPE, TimeoutExpired, CompletedProcess = subprocess.PIPE, subprocess.TimeoutExpired, subprocess.CompletedProcess

    @staticmethod
    def run(
        command: Sequence[str], *, input: str, env: Mapping[str, str], timeout: float | None, **options: Any
    ) -> "subprocess.CompletedProcess[str]":
        with ExitStack() as files:
            given, out, err = (files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(3))
            given.write(input)
            given.seek(0)
            process = ForkedModule(command, stdin=given, stdout=out, stderr=err, env=env)
            try:
                code = process.wait(timeout)
            finally:
                process.kill()
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(command, code, out.read(), err.read())


def _run(held: dict[int, Connection], argv: list[str], env: dict[str, str], cwd: str) -> None:
    forks.begin({})
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number in (0, 1, 2):
        os.dup2(held[number].fileno(), number)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", 1)
    sys.path[:0] = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path not in sys.path]
    module, *pipes = argv
    sys.argv = [module, *(str(os.dup(held[int(number)].fileno())) for number in pipes)]
    for connection in held.values():
        connection.close()
    runpy.run_module(module, run_name="__main__", alter_sys=True)
