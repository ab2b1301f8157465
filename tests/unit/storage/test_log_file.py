import logging
import threading
import time
from pathlib import Path

import pytest

from orchestrator.storage import log_file
from orchestrator.storage.log_file import flush_logs, log_to


@pytest.fixture
def logger() -> logging.Logger:
    return logging.getLogger("orchestrator.test")


def test_lines_are_in_the_file_once_they_are_flushed(tmp_path: Path, logger: logging.Logger) -> None:
    path = tmp_path / "logs" / "controller.log"  # its directory does not exist yet
    before = list(logging.getLogger("orchestrator").handlers)
    log_to(path)
    try:
        logger.info("the %s line", "first")
        flush_logs(20.0)
        assert path.read_text().rstrip().endswith("INFO orchestrator.test the first line")
    finally:
        logging.getLogger("orchestrator").handlers[:] = before


def test_a_line_does_not_wait_for_storage_that_hangs(
    tmp_path: Path, logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = threading.Event()
    monkeypatch.setattr(log_file, "MOST_WAITING", 3)
    monkeypatch.setattr(log_file._LogFile, "emit", lambda self, record: opened.wait(20.0))
    before = list(logging.getLogger("orchestrator").handlers)
    log_to(tmp_path / "controller.log")
    try:
        began_s = time.monotonic()
        for number in range(10):  # more than may wait: the last ones are dropped
            logger.info("line %d", number)
        assert time.monotonic() - began_s < 10.0  # a single line takes 20 s to write
        opened.set()
        flush_logs(20.0)
    finally:
        logging.getLogger("orchestrator").handlers[:] = before
