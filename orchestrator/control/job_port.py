"""Ray's Jobs API: how a cluster is reached by who reaches nothing of it but one HTTP port.

A job is submitted as a Ray job whose driver (`orchestrator.cli.remote`) stays until the run's end. All other commands
run in the cluster as jobs of a few seconds; the next one has Ray forget those before it. What such a command writes to
stderr comes marked, since a job has one log for both.
"""

import asyncio
import logging
import os
import shlex
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orchestrator.control.access import ALLOW_NO_TOKEN, check_jobs_port, check_token_file, token_refused
from orchestrator.errors import ClusterUnreachable, OrchestratorError, UsageError

MARK = "\x1f"  # begins a line that was written to stderr
MARKED = "ORCHESTRATOR_MARK_STDERR"
OURS = f"{MARK}{MARK}ours"  # the line after Ray's own
PYTHON = "ORCHESTRATOR_PYTHON"  # in the head's environment: the interpreter that has us installed, if not `python`
LEFT_OUT = [".git", ".venv", "venv", "runs", "mlruns", "__pycache__", "*.pyc", ".*_cache", "node_modules"]
MOST_BYTES = 100 << 20  # that are sent with a job
PATIENCE_S = 60.0  # for a job to begin
LOOK_EVERY_S = 0.2
WATCHED_S = 3.0  # for so long Ray looks after a job that has ended, and one that it is to forget comes back as failed
COMMAND = "command"
REACH = "Name the port of the cluster's Jobs API, like http://10.0.0.5:8265."


def is_url(address: str | None) -> bool:
    return address is not None and "://" in address


class JobPort:
    """A cluster's Jobs API.

    Args:
        url: http://HOST:PORT, or https.

    Raises:
        UsageError: it is no such URL.
        ClusterUnreachable: nobody answers there, or something else.
        NotAllowed: the cluster wants a token, or another one; or it asks for none and isn't on loopback.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"cluster address {url} is no URL of a Jobs API", remedy=REACH)
        from ray.job_submission import JobSubmissionClient

        for module in ("dashboard_sdk", "job.sdk"):  # tell of every upload
            logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            os.environ.pop(name, None)  # Ray would take these instead of what it is told
        check_token_file()
        self._asked(lambda: check_jobs_port(url))
        self._client = self._asked(lambda: JobSubmissionClient(url))

    def run(self, command: list[str], on_line: Callable[[str], None], stays: bool = False) -> int:
        """Run a command of ours in the cluster, hand each line of its output on, and return its exit code.

        Args:
            stays: it goes on until it is interrupted or a run ends, and may say much.
        """
        job = self._submit(command, {}, {"orchestrator": COMMAND}, COMMAND)
        self._forget_earlier(job)
        before: list[str] = []
        is_ours = False

        def look(line: str) -> None:
            nonlocal is_ours
            if is_ours:
                on_line(line)
            else:
                is_ours = line == OURS
                before.append(line)

        try:
            if stays:
                asyncio.run(self._follow(job, look))
            ended = self._ended(job)
            if not stays:  # a connection for its output is closed some seconds after its end
                for line in self._asked(lambda: self._client.get_job_logs(job)).splitlines():
                    look(line)
            if is_ours and ended.driver_exit_code is not None:
                return int(ended.driver_exit_code)
            said = "\n".join(line for line in before[-5:] if line != OURS)
            raise ClusterUnreachable(
                f"the cluster's job {job} {ended.status.lower()}: {ended.message}\n{said}".rstrip()
            )
        except KeyboardInterrupt:
            self._asked(lambda: self._client.stop_job(job))
            raise

    def start(
        self, command: list[str], directory: Path, name: str, on_line: Callable[[str], bool]
    ) -> tuple[str, int | None]:
        """Start a driver of ours in a copy of `directory`; hand lines of its output on until `on_line` says no more.

        Returns:
            the job's id, and None: it goes on; or the exit code with which it has refused, and is forgotten.

        Raises:
            UsageError: the directory is too large to be sent, or has links that lead out of it.
            ClusterUnreachable: the job ended, or did not begin in time.
        """
        _check_directory(directory)
        os.environ["RAY_RUNTIME_ENV_IGNORE_GITIGNORE"] = "1"  # what was generated may be needed, too
        runtime_env = {"working_dir": str(directory), "excludes": LEFT_OUT}
        job = self._submit(command, runtime_env, {"orchestrator": "run", "run": name}, name)
        seen, deadline_s = 0, time.monotonic() + PATIENCE_S
        while True:
            info = self._asked(lambda: self._client.get_job_info(job))
            lines = self._asked(lambda: self._client.get_job_logs(job)).splitlines()
            for line in lines[seen:]:
                if not on_line(line):
                    return job, None
            seen = len(lines)
            if info.status.is_terminal():
                time.sleep(WATCHED_S)
                self._asked(lambda: self._client.delete_job(job))
                if OURS in lines and info.driver_exit_code is not None:
                    return job, int(info.driver_exit_code)
                raise ClusterUnreachable(
                    f"job {job} {info.status.lower()} before it had begun: {info.message}",
                    unchanged="Nothing was started.",
                )
            if seen == 0 and time.monotonic() > deadline_s:
                self._client.stop_job(job)
                raise ClusterUnreachable(
                    f"job {job} has not begun within {PATIENCE_S:.0f} s: {info.message}",
                    remedy="See with `ray status` what keeps the cluster from starting a process on its head.",
                    unchanged="The job was stopped.",
                )
            time.sleep(LOOK_EVERY_S)

    def _submit(self, command: list[str], runtime_env: dict[str, Any], metadata: dict[str, str], name: str) -> str:
        entrypoint = f"${{{PYTHON}:-python}} -m orchestrator.cli.main {shlex.join(command)}"
        job = self._asked(
            lambda: self._client.submit_job(
                entrypoint=entrypoint,
                submission_id=f"{name}-{uuid.uuid4().hex[:8]}",
                runtime_env={**runtime_env, "env_vars": {MARKED: "1"} | _allowance()},
                metadata=metadata,
            )
        )
        return str(job)

    async def _follow(self, job: str, on_line: Callable[[str], None]) -> None:
        rest, chunks = "", self._client.tail_job_logs(job)
        async for chunk in _without_failures(chunks):
            *lines, rest = (rest + chunk).split("\n")
            for line in lines:
                on_line(line)
        if rest:
            on_line(rest)

    def _ended(self, job: str) -> Any:
        while not (info := self._asked(lambda: self._client.get_job_info(job))).status.is_terminal():
            time.sleep(LOOK_EVERY_S)
        return info

    def _forget_earlier(self, job: str) -> None:
        """Have Ray forget commands that had ended well before this one began, by the cluster's own clock."""
        began_ms = self._asked(lambda: self._client.get_job_info(job)).start_time
        for info in self._asked(self._client.list_jobs):
            name, ended_ms = info.submission_id or "", info.end_time
            if name.startswith(f"{COMMAND}-") and ended_ms and ended_ms + WATCHED_S * 1000 < began_ms:
                with suppress(OrchestratorError):  # another one was faster
                    self._asked(partial(self._client.delete_job, name))

    def _asked(self, ask: Callable[[], Any]) -> Any:
        from ray.exceptions import AuthenticationError
        from requests import RequestException

        try:
            return ask()
        except AuthenticationError:
            raise token_refused(self.url) from None
        except (ConnectionError, RequestException) as error:
            raise ClusterUnreachable(f"no cluster answers at {self.url}", remedy=REACH) from error
        except RuntimeError as error:
            told = str(error).splitlines()[0]
            raise ClusterUnreachable(f"the cluster at {self.url} answered: {told}", remedy=REACH) from error


def _check_directory(directory: Path) -> None:
    """Raise UsageError if what would be sent is too much, or not in there: Ray sends what links lead to."""
    sizes: dict[Path, int] = {}
    for folder, folders, files in os.walk(directory):
        folders[:] = [name for name in folders if not _is_left_out(name)]
        paths = [Path(folder) / name for name in files if not _is_left_out(name)]
        for path in (*paths, *(Path(folder) / name for name in folders)):
            _check_link(path, directory)
        sizes |= {path: path.stat().st_size for path in paths}
    if (total := sum(sizes.values())) > MOST_BYTES:
        largest = max(sizes, key=lambda path: sizes[path])
        raise UsageError(
            f"{directory} can't be sent to the cluster: it holds {total >> 20} MiB, of {MOST_BYTES >> 20} MiB at most; "
            f"{largest.relative_to(directory)} alone {sizes[largest] >> 20} MiB",
            remedy="Submit from a directory with the job file and the code it needs; leave data where the cluster's "
            "nodes see it.",
            unchanged="Nothing was started.",
        )


def _check_link(path: Path, directory: Path) -> None:
    if not path.is_symlink():
        return
    target = path.resolve()
    if not target.is_relative_to(directory.resolve()):
        wrong = f"leads out of it, to {target}"
    elif target.is_dir():
        wrong = f"leads to a directory, {target}"
    elif not target.exists():
        wrong = "leads nowhere"
    else:
        return
    raise UsageError(
        f"{directory} can't be sent to the cluster: the link {path.relative_to(directory)} {wrong}",
        remedy="Put a copy in its place, or remove it.",
        unchanged="Nothing was started.",
    )


def _allowance() -> dict[str, str]:
    """What the user has said aloud here holds for what we start there, too."""
    return {name: value for name, value in os.environ.items() if name == ALLOW_NO_TOKEN}


def _is_left_out(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in LEFT_OUT)


async def _without_failures(chunks: AsyncIterator[str]) -> AsyncIterator[str]:
    """What comes until the connection ends; a job that has ended breaks it at times."""
    try:
        async for chunk in chunks:
            yield chunk
    except RuntimeError:
        return
