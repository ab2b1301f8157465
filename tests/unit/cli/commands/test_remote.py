"""What of a command goes to a cluster that is named by URL, and what comes back."""

import io
import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from orchestrator.cli.commands import remote
from orchestrator.cli.commands.remote import (
    FORWARDED,
    STOPPED,
    Marked,
    _Stopped,
    _without_address,
    forwarded,
    submit_by_url,
    write,
)
from orchestrator.cli.main import app
from orchestrator.cluster.jobs_api import MARK, JobsApiClient
from orchestrator.errors import ClusterUnreachable, JobDoesNotFit, UsageError
from orchestrator.submission.by_url import BEGUN, submit_file

URL = "http://127.0.0.1:9"
STATUS = '{"run_id": "far"}'


@pytest.mark.parametrize(
    ("arguments", "rest"),
    [
        (["status", "a", "--address", "http://h:1"], ["status", "a"]),
        (["--address=http://h:1", "ls", "-o", "json"], ["ls", "-o", "json"]),
    ],
)
def test_a_command_goes_without_the_address(arguments: list[str], rest: list[str]) -> None:
    assert _without_address(arguments) == (rest, "http://h:1")


def test_the_environment_names_an_address_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "https://h:1")
    assert _without_address(["ls"]) == (["ls"], "https://h:1")
    assert _without_address(["ls", "--address", "h:2"]) == (["ls"], "h:2")


@pytest.mark.parametrize(
    "arguments", [[], ["job", "validate", "job.yaml", "--address", "http://h:1"], ["ls"], ["ls", "--address", "h:6379"]]
)
def test_what_names_no_url_or_needs_no_cluster_runs_here(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert forwarded(arguments) is None


@pytest.mark.parametrize("verb", FORWARDED)
def test_what_reads_or_steers_a_run_goes_to_a_cluster_that_is_named_by_url(verb: str) -> None:
    with pytest.raises(ClusterUnreachable, match="no cluster answers at http://127.0.0.1:9"):
        forwarded([*verb.split(), "run", "--address", "http://127.0.0.1:9"])


@pytest.mark.parametrize("storage", [["--storage", "runs"], ["--storage=runs"]])
@pytest.mark.parametrize("verb", FORWARDED)
def test_where_run_storage_is_named_only_resume_and_what_names_the_cluster_too_goes_there(
    verb: str, storage: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    command = [*verb.split(), "run", *storage]
    if verb == "resume":
        with pytest.raises(ClusterUnreachable):
            forwarded(command)
    else:
        assert forwarded(command) is None
    with pytest.raises(ClusterUnreachable):
        forwarded([*command, "--address", "http://127.0.0.1:9"])


def test_stdout_and_stderr_are_returned_separately(capsys: pytest.CaptureFixture[str]) -> None:
    log = io.StringIO()
    marked = Marked(log)
    for text in ("a wa", "rning\nand ", "another\n"):
        marked.write(text)
    assert log.getvalue() == f"{MARK}a warning\n{MARK}and another\n"
    for line in ["data", *log.getvalue().splitlines()]:
        write(line)
    out, err = capsys.readouterr()
    assert (out, err) == ("data\n", "a warning\nand another\n")


@pytest.mark.parametrize("url", ["ftp://h:1", "http://", "ray://h:10001"])
def test_what_is_no_url_of_a_jobs_api_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="is no URL of a Jobs API"):
        JobsApiClient(url)


def test_an_address_without_a_server_is_an_error() -> None:
    with pytest.raises(ClusterUnreachable, match="no cluster answers at http://127.0.0.1:9"):
        JobsApiClient("http://127.0.0.1:9")


def test_paths_of_this_machine_are_refused_before_anything_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text("schema: v1\nname: far\n")
    with pytest.raises(UsageError, match="storage ./runs is relative"):
        submit_by_url("http://127.0.0.1:9", Path("job.yaml"), None, [], None)
    with pytest.raises(UsageError, match="is not in the current directory"):
        submit_by_url("http://127.0.0.1:9", tmp_path / "job.yaml", None, ["storage=/shared"], None)
    with pytest.raises(ClusterUnreachable):
        submit_by_url("http://127.0.0.1:9", Path("job.yaml"), None, ["storage=/shared"], None)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"entrypoint": "mine:build", "code_dir": "/usr/lib"}, "comes from /usr/lib, which is not in the current"),
        ({"entrypoint": "mine:build", "code_dir": "../code"}, r"comes from ../code, which is not in the current"),
        ({"entrypoint": "os:system"}, "No module named 'os'"),
    ],
)
def test_code_that_would_not_be_sent_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: dict[str, str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    job = {"schema": "v1", "name": "far", "storage": "/shared", "model": model}
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    with pytest.raises(UsageError, match=told):
        submit_by_url("http://127.0.0.1:9", Path("job.yaml"), None, [], None)


class Port:
    """A Jobs API whose run logs a line and succeeds. Keeps the command of its driver, and for how long it may wait."""

    def __init__(self) -> None:
        self.driver: list[str] = []
        self.waits_s = -1.0

    def start(
        self, command: list[str], directory: Path, name: str, on_line: Callable[[str], bool], waits_s: float
    ) -> tuple[str, int | None]:
        self.driver, self.waits_s = command, waits_s
        return "far-1", None

    def follow(self, job: str, on_line: Callable[[str], None]) -> int:
        for line in (BEGUN, "a log line", f"{MARK}a message"):
            on_line(line)
        return 0

    def run(self, command: list[str], on_line: Callable[[str], None]) -> int:
        assert command == ["status", "far", "-o", "json"]
        on_line(STATUS)
        return 0


@pytest.fixture
def port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Port:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text("schema: v1\nname: far\nstorage: /shared\n")
    port = Port()
    monkeypatch.setattr(remote, "JobsApiClient", lambda url: port)
    return port


def by_url(*arguments: str) -> Result:
    done = CliRunner().invoke(app, [*arguments, "--address", URL])
    assert done.exit_code == 0, done.output
    return done


@pytest.mark.parametrize("verb", [["submit"], ["run"], ["run", "-d"]], ids=" ".join)
def test_the_time_to_wait_for_room_goes_to_the_driver(verb: list[str], port: Port) -> None:
    by_url(*verb, "job.yaml", "--timeout", "400", "--set", "eval.every=5")
    assert port.driver == ["drive", "job.yaml", "--name", "far", "--set", "eval.every=5", "--timeout", "400.0"]
    assert port.waits_s == 400.0
    by_url(*verb, "job.yaml")
    assert "--timeout" not in port.driver and port.waits_s == 0.0


def test_a_detached_run_prints_what_a_submission_does(port: Port) -> None:
    for output in (["-o", "text"], ["-o", "json"]):
        detached, submitted = (by_url(*verb, "job.yaml", *output).stdout for verb in (["run", "-d"], ["submit"]))
        assert detached == submitted and "far" in detached


def test_json_of_a_run_is_its_status_and_nothing_else(port: Port) -> None:
    done = by_url("run", "job.yaml", "-o", "json")
    assert done.stdout == f"{STATUS}\n" and "a log line\na message\n" in done.stderr
    assert by_url("run", "job.yaml").stdout == "a log line\n"


def test_a_driver_that_waits_for_room_ends_at_a_signal() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        stopped, acted = _Stopped(), []
        with stopped.later():
            stopped.on_wait(JobDoesNotFit("no room"))
            signal.raise_signal(signal.SIGTERM)  # deferred: the run may be submitted at this moment
            with pytest.raises(SystemExit) as end:
                stopped.on_wait(JobDoesNotFit("no room"))
            assert end.value.code == STOPPED
            with pytest.raises(SystemExit):
                stopped.then(lambda: acted.append("stop"))
        assert acted == ["stop"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_from_python_a_wait_without_room_is_an_error(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(
        command: list[str], directory: Path, name: str, on_line: Callable[[str], bool], waits_s: float
    ) -> tuple[str, int | None]:
        assert command[-2:] == ["--timeout", "3.0"]
        for line in ("Waiting for room: a", "error: no room"):
            on_line(MARK + line)
        return "far-1", JobDoesNotFit.exit_code

    monkeypatch.setattr(port, "start", refused)
    with pytest.raises(JobDoesNotFit, match="^no room"):
        submit_file(port, "job.yaml", None, [], 3.0)
