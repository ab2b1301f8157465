"""Runner of child processes that import torch, which this process doesn't. They end with the block that started them.

As in a worker, modules are not imported from the current directory unless the job names it.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any, Self

from orchestrator.protocol.child_process import Lines

SHOWN_LINES = 20  # at most, of the output of a process that ended by itself
ROOT = str(Path(__file__).parents[1])  # contains the package


def run_module(
    module: str, text: str, env: Mapping[str, str] | None = None, timeout_s: float | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run a module of the package on this input to its end. Raises subprocess.TimeoutExpired."""
    return subprocess.run(
        _command(module), input=text, capture_output=True, text=True, env=_environment(env or {}), timeout=timeout_s
    )


class TorchProcess:
    """A process that takes one message and answers with many.

        with TorchProcess("orchestrator.inference.process", MODEL_LINES) as process:
            process.send(request)
            for answer in process.answers():
                ...

    Answers have a pipe of their own, apart from what models print.

    Args:
        module: its `main` answers within `protocol.child_process.answering`.
        env: variables added to this process's environment.
    """

    def __init__(self, module: str, lines: Lines, env: Mapping[str, str] | None = None) -> None:
        self._lines = lines
        with ExitStack() as opened:
            self._printed: IO[str] = opened.enter_context(tempfile.TemporaryFile("w+"))
            reading, writing = os.pipe()
            self._answers: IO[str] = opened.enter_context(os.fdopen(reading))
            with os.fdopen(writing, "w"):
                self._process = subprocess.Popen(
                    [*_command(module), str(writing)],
                    stdin=subprocess.PIPE,
                    stdout=self._printed,
                    stderr=self._printed,
                    text=True,
                    pass_fds=[writing],
                    start_new_session=True,  # Ctrl-C goes to this process only, which ends the child
                    env=_environment(env or {}),
                )
            self._opened = opened.pop_all()

    def send(self, message: Any) -> None:
        """Send the message. Raises OSError if the process has ended."""
        assert self._process.stdin is not None
        with self._process.stdin as stdin:
            stdin.write(self._lines.write(message) + "\n")

    def answers(self) -> Iterator[Any]:
        """Yield its answers until it ends or closes the pipe."""
        for line in self._answers:
            yield self._lines.read(line)

    def exit_code(self, timeout_s: float | None = None) -> int | None:
        """Its exit code, once it has ended; None if it doesn't within `timeout_s`. None: wait for its end."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
        return self._process.poll()

    def output(self) -> str:
        """The end of what it printed."""
        self._printed.seek(0)
        return "\n".join(self._printed.read().splitlines()[-SHOWN_LINES:])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        with suppress(OSError):  # the reader has ended before all was written
            self._process.stdin.close()  # type: ignore[union-attr]
        self._opened.close()


def _command(module: str) -> list[str]:
    return [sys.executable, "-P", "-m", module]


def _environment(env: Mapping[str, str]) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))
    return {**os.environ, **env, "PYTHONPATH": path}
