"""Records that count as signed with another key: read whole before, and only once the run has ended."""

from hashlib import sha256
from pathlib import Path

import pytest

from orchestrator.errors import KeyUnknown, UsageError
from orchestrator.run_records.job_files import check_job
from orchestrator.storage.backends import signing_keys
from orchestrator.storage.backends.signed_objects import SigningKey
from orchestrator.storage.backends.signing_keys import (
    key_to_resume,
    read_key,
    run_objects,
)
from orchestrator.storage.journal import Journal, read_events
from orchestrator.submission.adoption import adopt_records
from tests.support.signed_runs import SECRET, run_of


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("ORCHESTRATOR_SIGNING_KEYS", raising=False)
    monkeypatch.setattr(signing_keys, "_sources", [])
    return tmp_path / "home"


def test_an_adopted_run_continues_with_the_key_that_adopted_it(tmp_path: Path) -> None:
    run_dir = run_of(tmp_path, "auto", SigningKey(b"a key that was lost"))
    (run_dir / "status-0000000001.json").write_text("{}")  # it has ended
    with pytest.raises(KeyUnknown):
        key_to_resume(run_dir, None)
    own = read_key("auto")
    adopted = adopt_records(run_dir, own)
    assert (adopted.num_objects, adopted.key_id, adopted.checkpoint) == (4, own.id, None)
    assert key_to_resume(run_dir, None) == own
    Journal(run_objects(run_dir, key=own)).append([{"kind": "two"}])
    assert [event["kind"] for event in read_events(run_objects(run_dir))] == ["storage_works", "two"]


def test_a_run_that_may_be_going_on_is_not_adopted(tmp_path: Path) -> None:
    run_dir = run_of(tmp_path, None, None)
    with pytest.raises(UsageError, match="demo may be active: its journal was written [01] s ago"):
        adopt_records(run_dir, read_key("auto"))
    assert not (run_dir / "adopted").exists()


def test_adoption_refuses_a_job_that_is_not_the_one_submitted(tmp_path: Path) -> None:
    run_dir = run_of(tmp_path, None, None)
    (run_dir / "status-0000000001.json").write_text("{}")
    submitted = {"kind": "submitted", "run_id": "demo", "workers": 1, "job_sha256": "0" * 64}
    Journal(run_objects(run_dir)).append([submitted])
    with pytest.raises(UsageError, match="job.json is not what was submitted"):
        adopt_records(run_dir, read_key("auto"))
    assert not (run_dir / "adopted").exists()


def test_the_key_that_adopted_last_is_the_runs_key(tmp_path: Path) -> None:
    old, new = SigningKey(b"a key that is replaced"), read_key("auto")
    run_dir = run_of(tmp_path, "auto", old)
    (run_dir / "status-0000000001.json").write_text("{}")
    signing_keys.add_key_source({run_dir: old}.get)  # of a cluster that hasn't heard of it
    adopt_records(run_dir, new)
    assert key_to_resume(run_dir, None) == new
    (tmp_path / "home" / "keys" / "own").unlink()
    with pytest.raises(KeyUnknown, match=new.id):
        key_to_resume(run_dir, None)


def test_a_job_is_only_believed_with_a_digest_that_is_signed(tmp_path: Path) -> None:
    key = SigningKey(SECRET.encode())
    run_dir = run_of(tmp_path, None, key)
    records, data = run_objects(run_dir, key=key), (run_dir / "job.json").read_bytes()
    with pytest.raises(UsageError, match="job.json may not be what was submitted.*has no digest of it"):
        check_job(run_dir, data, "", records)
    check_job(run_dir, data, sha256(data).hexdigest(), records)
    with pytest.raises(UsageError, match="job.json is not what was submitted"):
        check_job(run_dir, data + b" ", sha256(data).hexdigest(), records)
    (run_dir / "status-0000000001.json").write_text("{}")
    adopt_records(run_dir, key)
    check_job(run_dir, data, "", run_objects(run_dir, key=key))
    with pytest.raises(UsageError, match="may not be"):
        check_job(run_dir, data + b" ", "", run_objects(run_dir, key=key))
