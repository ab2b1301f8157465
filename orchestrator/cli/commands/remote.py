"""Commands for a cluster that is reachable only by its Jobs API, at both ends.

Outside, `forwarded` runs a command in the cluster as a short job. Inside, `drive` is the driver of a submitted job: it
keeps the submitted code in run storage, submits the run and stays until its end, so that Ray shows both as one.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TextIO

import typer

from orchestrator.cli.terminal.options import Name, Set, Timeout, overrides_of
from orchestrator.cli.terminal.output import Format, narrate, narrate_wait, show
from orchestrator.cluster.jobs_api import MARK, MARKED, OURS, JobsApiClient, is_url
from orchestrator.errors import JobDoesNotFit, UsageError
from orchestrator.submission.by_url import BEGUN, load_for_elsewhere, send

# Commands that read or steer runs. The others work on files of this machine.
FORWARDED = (
    *("ls", "status", "wait", "logs", "events", "report"),
    *("scale", "pause", "resume", "stop", "rm", "set", "curriculum set", "fault kill-worker"),
    *("checkpoint now", "checkpoint ls", "checkpoint verify", "checkpoint rm", "check data"),
    *("experts rebalance", "experts set"),
)
STAYS = frozenset({"-f", "--follow", "--watch"})
STOPPED = 103


def forwarded(arguments: list[str]) -> int | None:
    """Run a command in the cluster that is named by URL. Returns its exit code; None for a command to run here."""
    if not any(arguments[: len(words)] == words for words in map(str.split, FORWARDED)):
        return None
    rest, url = _without_address(arguments)
    options = {word.split("=")[0] for word in rest}
    # Storage that is named is this machine's, unless the cluster is named too; `resume` names the cluster's.
    reads_here = "--storage" in options and rest == arguments and arguments[0] != "resume"
    if not is_url(url) or reads_here:
        return None
    if "--key-file" in options:
        raise UsageError(
            "--key-file names a file of this machine, and the command is carried out in the cluster",
            remedy="Call it there, or put the key into $ORCHESTRATOR_HOME/keys of its head.",
            unchanged="Nothing was started.",
        )
    waits = arguments[0] == "wait"
    stays = waits or not STAYS.isdisjoint(rest)
    try:
        return JobsApiClient(str(url)).run(rest, write, stays)
    except KeyboardInterrupt:
        if stays and not waits:
            return 0  # Ctrl-C ends following
        raise


def write(line: str) -> None:
    """Print a line of a command in the cluster, to stdout or stderr as marked."""
    text = line.lstrip(MARK)
    print(text, file=sys.stderr if line.startswith(MARK) else sys.stdout, flush=True)


def submit_by_url(
    url: str, job: Path, name: str | None, overrides: list[str], timeout_s: float | None, dry_run: bool = False
) -> tuple[str, str]:
    """Send a job and the current directory to a cluster. Returns the names of the run and of its job once the run is
    submitted there.

    Raises:
        SpecError, UsageError: as `load_for_elsewhere`.
        OrchestratorError: the error of the cluster.
    """
    spec = load_for_elsewhere(job, overrides)
    run_id = name or spec.name
    port = JobsApiClient(url)
    if dry_run:
        narrate(f"Run {run_id} would be submitted to {url} and stored in {spec.storage}. Nothing was started.")
        return run_id, ""
    job_id, refused = send(port, job, run_id, overrides, timeout_s, write)
    if refused is not None:
        raise typer.Exit(refused)
    narrate(
        f"Run {run_id} is submitted as job {job_id}. `orchestrator status {run_id} --address {url}` shows where it is."
    )
    return run_id, job_id


def run_by_url(
    url: str, job: Path, name: str | None, overrides: list[str], timeout_s: float | None, output: Format
) -> None:
    """Send a job, show the log lines of its run and end as the run does. Ctrl-C detaches: the run goes on.

    With `-o json`, log lines go to stderr and the status at the run's end to stdout.
    """
    run_id, job_id = submit_by_url(url, job, name, overrides, timeout_s)
    port, mark = JobsApiClient(url), MARK if output is Format.JSON else ""
    try:
        code = port.follow(job_id, lambda line: None if line == BEGUN else write(mark + line))
    except KeyboardInterrupt:
        narrate(f"Detached; run {run_id} continues. `orchestrator stop {run_id} --address {url}` ends it.")
        raise typer.Exit(101) from None
    if output is Format.JSON:
        port.run(["status", run_id, "-o", "json"], write)
    raise typer.Exit(code)


def drive(job: Path, name: Name = None, settings: Set = None, timeout: Timeout = None) -> None:
    """Submit a job from within the cluster and stay until the run's end."""
    from orchestrator.client import OrchestratorClient, check_job, raise_unless_succeeded
    from orchestrator.cluster.packages import keep, sweep
    from orchestrator.spec.job_file.loading import load_job

    stopped = _Stopped()
    overrides = overrides_of(settings, None)
    storage = Path(load_job(job, overrides).storage)
    package = keep(Path.cwd(), storage)
    try:
        os.chdir(package.path)
        check_job(job, name, overrides)  # takes long with a user-defined model
        client = OrchestratorClient()
        with stopped.later():
            run_id = client.submit(job, name=name, overrides=overrides, timeout_s=timeout, on_wait=stopped.on_wait)
    except BaseException:
        os.chdir("/")
        package.discard()
        raise
    stopped.then(lambda: client.stop(run_id))  # Ray kills this process in 3 s; the controller writes the checkpoint
    show(BEGUN)
    sys.stdout.flush()
    sweep(storage)
    for line in client.logs(run_id, follow=True):
        show(f"{line.stamp}  {line.source:<12}  {line.text}")
        sys.stdout.flush()
    raise_unless_succeeded(client.get(run_id))


class _Stopped:
    """Handler of SIGTERM, which `ray job stop` sends: takes the action that is due before the end, then ends this
    process. It never acts between a run's submission and our knowledge of it."""

    def __init__(self) -> None:
        self._waits, self._heard = False, False
        self._before_end: Callable[[], object] = lambda: None
        signal.signal(signal.SIGTERM, self._hear)

    @contextmanager
    def later(self) -> Iterator[None]:
        """Defer the handling of signals until `then` has set the action."""
        signal.signal(signal.SIGTERM, self._hear)  # again: Ray sets a handler of its own when it connects
        self._waits = True
        yield

    def then(self, before_end: Callable[[], object]) -> None:
        self._before_end, self._waits = before_end, False
        if self._heard:
            self._end()

    def on_wait(self, error: JobDoesNotFit) -> None:
        """Report that there is no room yet. Nothing is submitted now, so a signal that was deferred takes effect."""
        narrate_wait(error)
        if self._heard:
            self._end()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._heard = True
        if not self._waits:
            self._end()

    def _end(self) -> None:
        self._before_end()
        raise SystemExit(STOPPED)


class Marked:
    """A stream that marks its lines as those of stderr, for readers of a log that has both."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._begins = stream, True

    def write(self, text: str) -> int:
        for line in text.splitlines(keepends=True):
            self._stream.write(MARK + line if self._begins else line)
            self._begins = line.endswith("\n")
        return len(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def mark_stderr() -> None:
    """Mark the lines of stderr, in a job in the cluster."""
    if os.environ.pop(MARKED, None):
        show(OURS)
        sys.stdout.flush()
        sys.stderr = Marked(sys.stderr)


def _without_address(arguments: list[str]) -> tuple[list[str], str | None]:
    """A command without --address, and the value of that or of RAY_ADDRESS."""
    rest: list[str] = []
    url, words = os.environ.get("RAY_ADDRESS"), iter(arguments)
    for word in words:
        if word == "--address":
            url = next(words, None)
        elif word.startswith("--address="):
            url = word.partition("=")[2]
        else:
            rest.append(word)
    return rest, url


def answer(method: str, arguments: str) -> None:
    """Call the cluster's Scheduler from within; prints a line of JSON."""
    from orchestrator.submission import by_url

    show(by_url.answer(method, arguments))


def register(app: typer.Typer) -> None:
    app.command(hidden=True)(drive)
    app.command(hidden=True)(answer)
