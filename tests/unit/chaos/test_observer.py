"""The chaos suite's observer: sees what a run's storage holds, and what breaks while the run goes on."""

import shutil
import time
from pathlib import Path

import pytest

from orchestrator.storage.directory import DirectoryObjects
from orchestrator.storage.journal import Journal
from tests.chaos import observer as module
from tests.chaos.observer import Observer
from tests.support.checkpoints import write_checkpoint

PATIENCE_S = 30.0


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Journal:
    monkeypatch.setattr(module, "LOOK_EVERY_S", 0.02)
    journal = Journal(DirectoryObjects(tmp_path))
    journal.append([{"kind": "activated", "step": -1, "members": ["w0", "w1"]}])
    write_checkpoint(tmp_path, 20, journal=journal)
    journal.append([{"kind": "steps", "records": [{"step": 20}, {"step": 21}]}])
    return journal


def _await_faults(observer: Observer) -> list[str]:
    deadline_s = time.monotonic() + PATIENCE_S
    while not (faults := observer.new_faults()) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return faults


def _await_verified(observer: Observer) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not observer.num_verified and time.monotonic() < deadline_s:
        time.sleep(0.02)


def test_a_run_is_followed(tmp_path: Path, journal: Journal) -> None:
    with Observer(tmp_path) as observer:
        _await_verified(observer)
        assert (observer.step, observer.term, observer.members()) == (21, journal.term, ("w0", "w1"))
        assert observer.keeper() == () and observer.new_faults() == []


def test_the_keeper_is_the_one_that_is_connected(tmp_path: Path, journal: Journal) -> None:
    journal.append([{"kind": "keeper_connected", "worker": "w2", "step": 21}])
    with Observer(tmp_path) as observer:
        _await_verified(observer)
        assert observer.keeper() == ("w2",)


@pytest.mark.usefixtures("journal")
def test_a_promised_checkpoint_that_disappears_is_noticed(tmp_path: Path) -> None:
    with Observer(tmp_path) as observer:
        _await_verified(observer)
        shutil.rmtree(tmp_path / "checkpoints" / "step-00000020-000001-000000")
        assert "the checkpoint of step 20" in _await_faults(observer)[0]


@pytest.mark.usefixtures("journal")
def test_an_entry_that_breaks_the_chain_is_noticed(tmp_path: Path) -> None:
    with Observer(tmp_path) as observer:
        _await_verified(observer)
        broken = '{"term": 1, "prev": "", "nonce": "", "seq": 3, "holder": {}, "events": []}'
        (tmp_path / "journal" / f"{4:010d}").write_text(broken)
        assert _await_faults(observer)[0].startswith("journal entry 4 follows")
