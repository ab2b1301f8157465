"""Keys of runs: where they are found, and who may read them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import KeyUnknown, NotAllowed, OrchestratorError, UsageError
from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends import signing_keys
from orchestrator.storage.backends.signed_objects import SigningKey
from orchestrator.storage.backends.signing_keys import (
    hold_key,
    key_to_resume,
    read_key,
    run_objects,
    signer_of,
)
from orchestrator.storage.journal import read_events
from tests.support.disk import read_only, small_disk
from tests.support.signed_runs import SECRET, key_file, run_of


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("ORCHESTRATOR_SIGNING_KEYS", raising=False)
    monkeypatch.setattr(signing_keys, "_sources", [])
    return tmp_path / "home"


def test_a_key_is_read_from_the_place_that_the_job_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUR_KEY", f" {SECRET}\n")
    found = read_key(f"file:{key_file(tmp_path / 'key', SECRET)}")
    assert found == read_key("env:OUR_KEY") == SigningKey(SECRET.encode())


def test_a_users_own_key_is_made_once_and_only_the_user_may_read_it(home: Path) -> None:
    first = read_key("auto")
    assert read_key("auto") == first and len(first.secret) == 64
    assert (home / "keys" / "own").stat().st_mode & 0o777 == 0o600
    assert (home / "keys").stat().st_mode & 0o777 == 0o700
    assert [path.name for path in (home / "keys").iterdir()] == ["own"]


@pytest.mark.parametrize(
    ("text", "mode", "error", "message"),
    [
        ("short", 0o600, UsageError, "has 5 bytes; it must have 16 or more.*openssl rand"),
        (SECRET, 0o640, NotAllowed, r"may be read by others \(mode 0640\).*chmod 600"),
    ],
)
def test_a_bad_key_file_is_refused(
    tmp_path: Path, text: str, mode: int, error: type[OrchestratorError], message: str
) -> None:
    path = key_file(tmp_path / "key", text, mode)
    with pytest.raises(error, match=message) as raised:
        read_key(f"file:{path}")
    assert raised.value.unchanged == "Nothing was changed." and text not in str(raised.value).replace(str(path), "")


@pytest.mark.parametrize(("reference", "where"), [("file:/no/where", "/no/where"), ("env:NO_KEY", "NO_KEY")])
def test_an_absent_key_is_refused(reference: str, where: str) -> None:
    with pytest.raises(UsageError, match=where):
        read_key(reference)


@pytest.mark.parametrize("reference", ["own", "file:relative", "env:", "file", ""])
def test_a_reference_is_checked_with_the_job(reference: str) -> None:
    with pytest.raises(ValueError, match="must be auto, file:PATH with an absolute path, or env:NAME"):
        JobSpec.model_validate({"name": "demo", "signing_key": reference})


def test_a_run_is_read_with_a_key_of_its_user_and_not_with_what_its_job_names(tmp_path: Path, home: Path) -> None:
    key, file = SigningKey(SECRET.encode()), key_file(tmp_path / "secret")
    run_dir = run_of(tmp_path / "runs", f"file:{file}", key)  # who wrote that could know the file's content
    with pytest.raises(KeyUnknown, match=rf"key {key.id}.*keys.*--key-file FILE.*checkpoint adopt"):
        read_events(run_objects(run_dir))
    with pytest.raises(KeyUnknown):
        key_to_resume(run_dir, None)
    assert key_to_resume(run_dir, f"file:{file}") == key
    key_file(home / "keys" / "another", "another key, of something else")
    key_file(home / "keys" / "theirs")
    assert [event["kind"] for event in read_events(run_objects(run_dir))] == ["storage_works"]
    assert key_to_resume(run_dir, None) == key


def test_a_key_that_others_may_read_is_not_passed_over_in_silence(tmp_path: Path, home: Path) -> None:
    run_dir = run_of(tmp_path / "runs", "auto", SigningKey(SECRET.encode()))
    key_file(home / "keys" / "theirs", mode=0o644)
    with pytest.raises(NotAllowed, match="may be read by others"):
        read_events(run_objects(run_dir))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
def test_a_key_on_a_mount_that_nothing_can_change_may_have_any_mode(tmp_path: Path) -> None:
    with small_disk(tmp_path / "secrets", 1) as disk:
        path = key_file(disk / "key", mode=0o444)
        with read_only(disk):
            assert read_key(f"file:{path}") == SigningKey(SECRET.encode())


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.truncate(key_file(path), 10**6)], ids=["fifo", "large"])
def test_what_is_no_file_of_a_key_is_not_read(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "key")
    with pytest.raises(UsageError, match="no file of 64 KiB or less"):
        read_key(f"file:{tmp_path / 'key'}")


def test_a_run_without_a_key_is_read_and_resumed_without(tmp_path: Path) -> None:
    run_dir = run_of(tmp_path, None, None)
    assert [event["kind"] for event in read_events(run_objects(run_dir))] == ["storage_works"]
    assert key_to_resume(run_dir, None) is None
    with pytest.raises(OrchestratorError, match="isn't signed, and the run is"):
        read_events(run_objects(run_dir, key=SigningKey(SECRET.encode())))


def test_a_run_whose_signatures_were_taken_away_is_refused(tmp_path: Path) -> None:
    run_dir = run_of(tmp_path, "auto", None)
    with pytest.raises(OrchestratorError, match="isn't signed, and the run is"):
        read_events(run_objects(run_dir))


def test_the_cluster_s_key_comes_first(tmp_path: Path) -> None:
    known = SigningKey(b"known by the cluster")
    run_dir = run_of(tmp_path, None, known)
    signing_keys.add_key_source({run_dir: known}.get)
    assert key_to_resume(run_dir, None) == known
    assert [event["kind"] for event in read_events(run_objects(run_dir))] == ["storage_works"]


def test_a_key_that_is_held_is_held_by_children_too() -> None:
    key = SigningKey(SECRET.encode())
    hold_key(Path("/runs/other"), SigningKey(b"of another run, 1"))
    hold_key(Path("/runs/demo"), key)
    assert signer_of(Path("/runs/demo")) == key and signer_of(Path("/runs/absent")) is None
    script = (
        "from pathlib import Path; from orchestrator.storage.backends.signing_keys import signer_of;"
        "print(signer_of(Path('/runs/demo')).id)"
    )
    done = subprocess.run([sys.executable, "-c", script], env=dict(os.environ), capture_output=True, text=True)
    assert done.stdout.strip() == key.id
