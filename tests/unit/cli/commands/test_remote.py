"""What of a command goes to a cluster that is named by URL, and what comes back."""

import io
import json
from pathlib import Path

import pytest

from orchestrator.cli.commands.remote import FORWARDED, Marked, _without_address, forwarded, submit_by_url, write
from orchestrator.cluster.jobs_api import MARK, JobsApiClient
from orchestrator.errors import ClusterUnreachable, UsageError


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


def test_both_streams_come_back_apart(capsys: pytest.CaptureFixture[str]) -> None:
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


def test_nobody_there_is_told() -> None:
    with pytest.raises(ClusterUnreachable, match="no cluster answers at http://127.0.0.1:9"):
        JobsApiClient("http://127.0.0.1:9")


def test_paths_of_this_machine_are_refused_before_anything_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text("schema: v1\nname: far\n")
    with pytest.raises(UsageError, match="storage ./runs is relative"):
        submit_by_url("http://127.0.0.1:9", Path("job.yaml"), None, [], False)
    with pytest.raises(UsageError, match="is not in the current directory"):
        submit_by_url("http://127.0.0.1:9", tmp_path / "job.yaml", None, ["storage=/shared"], False)
    with pytest.raises(ClusterUnreachable):
        submit_by_url("http://127.0.0.1:9", Path("job.yaml"), None, ["storage=/shared"], False)


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
        submit_by_url("http://127.0.0.1:9", Path("job.yaml"), None, [], False)
