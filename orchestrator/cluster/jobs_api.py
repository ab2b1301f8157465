"""Client of Ray's Jobs API, for machines that reach only one HTTP port of a cluster.

A job is submitted as a Ray job whose driver (`orchestrator.cli.commands.remote`) stays until the run's end. All other
commands run in the cluster as jobs of a few seconds; each has Ray forget those before it. Lines that such a command
writes to stderr are marked, since a job has one log for both streams.
"""

import asyncio
import logging
import os
import shlex
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orchestrator.cluster.auth import (
    ALLOW_NO_TOKEN,
    check_jobs_port,
    check_token_file,
    reread_environment,
    token_refused,
)
from orchestrator.cluster.packages import check
from orchestrator.code_archive import LEFT_OUT
from orchestrator.errors import ClusterUnreachable, OrchestratorError, UsageError

MARK = "\x1f"  # begins a line that was written to stderr
MARKED = "ORCHESTRATOR_MARK_STDERR"
OURS = f"{MARK}{MARK}ours"  # the line that separates Ray's lines from ours
PYTHON = "ORCHESTRATOR_PYTHON"  # in the head's environment: the interpreter with this package, if not `python`
PATIENCE_S = 60.0  # for a job to begin
SUBMITTED_S = 300.0  # for a run to be submitted: trying out a user's own model may take two minutes
LONGEST_S = 3600.0  # for a command that doesn't stay: it may wait for room
LOOK_EVERY_S = 0.2
WATCHED_S = 3.0  # Ray monitors an ended job for this long; one that is deleted earlier reappears as failed
COMMAND = "command"
REACH = "Name the port of the cluster's Jobs API, like http://10.0.0.5:8265."


def is_url(address: str | None) -> bool:
    return address is not None and "://" in address


class JobsApiClient:
    """A cluster's Jobs API.

    Args:
        url: http://HOST:PORT, or https.

    Raises:
        UsageError: the URL is invalid.
        ClusterUnreachable: nothing answers there, or something other than a Jobs API does.
        NotAllowed: our token is missing or wrong; or the cluster asks for none and isn't on loopback.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"cluster address {url} is no URL of a Jobs API", remedy=REACH)
        from ray.job_submission import JobSubmissionClient

        for module in ("dashboard_sdk", "job.sdk"):  # which log every upload
            logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
        check_token_file()
        self._asked(lambda: check_jobs_port(url))
        reread_environment()
        with _no_other_address():
            self._client = self._asked(lambda: JobSubmissionClient(url))

    def run(self, command: list[str], on_line: Callable[[str], None], stays: bool = False) -> int:
        """Run a command of ours in the cluster, pass on each line of its output, and return its exit code.

        Args:
            stays: the command runs until it is interrupted or a run ends, and may print much.
        """
        job = self._submit(command, {}, {"orchestrator": COMMAND}, COMMAND)
        with self._stopped_with_us(job):
            self._forget_earlier(job)
            if stays:
                return self.follow(job, on_line)
            ended = self._ended(job, LONGEST_S)
            # a streaming connection would only close some seconds after the job's end
            lines = _Lines(on_line)
            for line in self._logs(job):
                lines.take(line)
            return self._exit_code(job, ended, lines)

    def follow(self, job: str, on_line: Callable[[str], None]) -> int:
        """Pass on the lines of a job of ours until it ends, and return its exit code."""
        lines = _Lines(on_line)
        while True:
            asyncio.run(self._follow(job, lines))
            info = self._asked(lambda: self._client.get_job_info(job))
            if info.status.is_terminal():
                return self._exit_code(job, info, lines)
            time.sleep(LOOK_EVERY_S)  # the connection broke, or Ray is about to report the job's end

    def start(
        self, command: list[str], directory: Path, name: str, on_line: Callable[[str], bool], waits_s: float = 0.0
    ) -> tuple[str, int | None]:
        """Start a driver of ours in a copy of `directory`; pass on its output until `on_line` returns False. The driver
        may wait for room for `waits_s`.

        Returns:
            the job's id, and None if the job continues, or the exit code with which it refused and was deleted.

        Raises:
            UsageError: the directory is too large to be sent, or has links that lead out of it.
            ClusterUnreachable: the job ended, or did not begin in time.
        """
        check(directory)
        os.environ["RAY_RUNTIME_ENV_IGNORE_GITIGNORE"] = "1"  # generated files may be needed, too
        runtime_env = {"working_dir": str(directory), "excludes": LEFT_OUT}
        job = self._submit(command, runtime_env, {"orchestrator": "run", "run": name}, name)
        with self._stopped_with_us(job):
            return job, self._await_begin(job, on_line, SUBMITTED_S + waits_s)

    def _await_begin(self, job: str, on_line: Callable[[str], bool], submitted_s: float) -> int | None:
        seen, began_s = 0, time.monotonic()
        while True:
            info = self._asked(lambda: self._client.get_job_info(job))
            lines = self._logs(job)
            for line in lines[seen:]:
                if not on_line(line):
                    return None
            seen = len(lines)
            if info.status.is_terminal():
                time.sleep(WATCHED_S)
                self._asked(lambda: self._client.delete_job(job))
                if OURS in lines and info.driver_exit_code is not None:
                    return int(info.driver_exit_code)
                raise ClusterUnreachable(
                    f"job {job} {info.status.lower()} before it had begun: {info.message}",
                    unchanged="Nothing was started.",
                )
            if time.monotonic() - began_s > (patience_s := PATIENCE_S if seen == 0 else submitted_s):
                raise ClusterUnreachable(
                    f"job {job} has not {'begun' if seen == 0 else 'submitted its run'} within {patience_s:.0f} s: "
                    f"{info.message}",
                    remedy="Check with `ray status` what keeps the cluster from starting a process on its head.",
                    unchanged="The job was stopped.",
                )
            time.sleep(LOOK_EVERY_S)

    @contextmanager
    def _stopped_with_us(self, job: str) -> Iterator[None]:
        """Have Ray stop the job if this process is interrupted or fails meanwhile."""
        try:
            yield
        except BaseException:
            with suppress(OrchestratorError):  # it has ended, or the cluster is unreachable
                self._asked(lambda: self._client.stop_job(job))
            raise

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

    async def _follow(self, job: str, lines: "_Lines") -> None:
        rest, known, chunks = "", lines.taken, self._client.tail_job_logs(job)
        async for chunk in _without_failures(chunks):  # each connection starts from the first line
            *whole, rest = (rest + chunk).split("\n")
            for line in whole[known:]:
                lines.take(line)
            known = max(0, known - len(whole))
        if rest and not known:
            lines.take(rest)

    def _logs(self, job: str) -> list[str]:
        return str(self._asked(lambda: self._client.get_job_logs(job))).splitlines()

    def _ended(self, job: str, patience_s: float) -> Any:
        deadline_s = time.monotonic() + patience_s
        while not (info := self._asked(lambda: self._client.get_job_info(job))).status.is_terminal():
            if time.monotonic() > deadline_s:
                raise ClusterUnreachable(
                    f"job {job} has not ended within {patience_s:.0f} s: {info.message}",
                    remedy="Check with `ray job logs` what it waits for.",
                    unchanged="The job was stopped.",
                )
            time.sleep(LOOK_EVERY_S)
        return info

    def _exit_code(self, job: str, ended: Any, lines: "_Lines") -> int:
        if lines.are_ours and ended.driver_exit_code is not None:
            return int(ended.driver_exit_code)
        last = "\n".join(lines.before[-5:])
        raise ClusterUnreachable(f"the cluster's job {job} {ended.status.lower()}: {ended.message}\n{last}".rstrip())

    def _forget_earlier(self, job: str) -> None:
        """Have Ray forget commands that ended well before this one began, by the cluster's own clock."""
        began_ms = self._asked(lambda: self._client.get_job_info(job)).start_time
        for info in self._asked(self._client.list_jobs):
            name, ended_ms = info.submission_id or "", info.end_time
            if name.startswith(f"{COMMAND}-") and ended_ms and ended_ms + WATCHED_S * 1000 < began_ms:
                with suppress(OrchestratorError):  # another client deleted it first
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
            answer = str(error).splitlines()[0]
            raise ClusterUnreachable(f"the cluster at {self.url} answered: {answer}", remedy=REACH) from error


class _Lines:
    """Lines of a job: ours are passed on, Ray's before them are kept apart."""

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self._on_line = on_line
        self.taken, self.are_ours = 0, False
        self.before: list[str] = []

    def take(self, line: str) -> None:
        self.taken += 1
        if self.are_ours:
            self._on_line(line)
        elif line == OURS:
            self.are_ours = True
        else:
            self.before.append(line)


@contextmanager
def _no_other_address() -> Iterator[None]:
    """Hide the environment variables that Ray would prefer to the given address."""
    names = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _allowance() -> dict[str, str]:
    """The user's explicit permission here, passed on to processes started in the cluster."""
    return {name: value for name, value in os.environ.items() if name == ALLOW_NO_TOKEN}


async def _without_failures(chunks: AsyncIterator[str]) -> AsyncIterator[str]:
    """Chunks until the connection ends; a job that has ended sometimes breaks it."""
    try:
        async for chunk in chunks:
            yield chunk
    except RuntimeError:
        return
