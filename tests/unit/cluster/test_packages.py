"""What came with jobs stays as long as a run refers to it."""

import json
import time
from pathlib import Path

import pytest

from orchestrator.cluster.packages import YOUNG_S, check, keep, sweep
from orchestrator.errors import UsageError


@pytest.fixture
def sent(tmp_path: Path) -> Path:
    (tmp_path / "sent" / "venv").mkdir(parents=True)
    (tmp_path / "sent" / "mine.py").touch()
    return tmp_path / "sent"


def test_one_that_no_run_refers_to_is_removed_when_it_is_old(sent: Path, tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    used, unused = (keep(sent, storage).path for _ in range(2))
    assert [path.name for path in used.iterdir()] == ["mine.py"]
    (storage / "mine").mkdir()
    (storage / "mine" / "job.json").write_text(json.dumps({"model": {"code_dir": f"{used}/code"}}))
    assert sweep(storage) == []  # a submission may be under way
    later = time.time() + YOUNG_S + 1
    assert sweep(storage, later) == [unused]
    assert used.exists() and not unused.exists() and sweep(storage, later) == []
    (storage / "mine" / "job.json").unlink()
    assert sweep(storage, later) == [used]


def test_a_storage_without_packages_is_unchanged(tmp_path: Path) -> None:
    assert sweep(tmp_path / "none") == []


def test_nothing_stays_of_one_that_was_refused(sent: Path, tmp_path: Path) -> None:
    keep(sent, tmp_path / "runs").discard()
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs").mkdir()  # the user's
    keep(sent, tmp_path / "runs").discard()
    assert list((tmp_path / "runs").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="can't be written in the cluster"):
        keep(sent, tmp_path / "file")


def test_links_that_lead_out_are_not_sent(tmp_path: Path) -> None:
    """Ray would send what they lead to: a key of the user's, say."""
    here, key = tmp_path / "here", tmp_path / "key"
    (here / "code").mkdir(parents=True)
    key.write_text("private")
    (here / "real.py").touch()
    (here / "code" / "same.py").symlink_to(here / "real.py")
    (here / ".venv").symlink_to(tmp_path)  # left out
    check(here)
    for name, target, wrong in (
        ("key", key, f"leads out of it, to {key}"),
        ("up", tmp_path, "leads out of it"),
        ("code/round", here, "leads to a directory"),
        ("gone", here / "nowhere", "leads nowhere"),
    ):
        (here / name).symlink_to(target)
        with pytest.raises(UsageError, match=f"the link {name} {wrong}.*Nothing was started"):
            check(here)
        (here / name).unlink()
