"""Secrets reach the environment and no log."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import secrets
from orchestrator.errors import UsageError
from orchestrator.secrets import redacted, take_secrets, without
from orchestrator.storage.log_file import flush_logs, log_to


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(secrets, "_known", set())
    monkeypatch.setenv("API_KEY", "before")  # so that what a test sets is taken back
    logger = logging.getLogger("orchestrator")
    before = list(logger.handlers), logger.level
    yield
    logger.handlers, logger.level = before


def test_a_secret_is_set_and_kept_out_of_logs(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("hunter22\n")
    log_to(tmp_path / "worker.log")
    take_secrets({"API_KEY": f"file:{tmp_path / 'key'}"})
    assert os.environ["API_KEY"] == "hunter22"
    log = logging.getLogger("orchestrator.worker")
    log.info("the key is %s", "hunter22")
    try:
        raise RuntimeError("no access with hunter22")
    except RuntimeError:
        log.exception("refused")
    flush_logs(20.0)
    text = (tmp_path / "worker.log").read_text()
    assert "hunter22" not in text and "the key is ***" in text and "no access with ***" in text
    assert redacted("hunter22!") == "***!"


def test_one_of_the_environment_is_known_by_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_KEY", "of this node")
    take_secrets({"API_KEY": "env:NODE_KEY"})
    assert os.environ["API_KEY"] == "of this node"


@pytest.mark.parametrize("reference", ["env:NO_SUCH_NAME", "file:/no/such/file"])
def test_a_missing_secret_is_named(reference: str) -> None:
    with pytest.raises(UsageError, match="secret API_KEY") as error:
        take_secrets({"API_KEY": reference})
    assert reference.partition(":")[2] in str(error.value)


def test_a_secret_within_another_and_one_of_several_lines_are_hidden() -> None:
    key = "-----BEGIN KEY-----\nabcdefgh\nxy\n-----END KEY-----"
    text = f"{key} abcdefgh hunter22 hunter2222 xy"
    assert without(text, [key, "hunter22", "hunter2222", "xy"]) == "*** *** *** *** xy"  # what is short is a word
