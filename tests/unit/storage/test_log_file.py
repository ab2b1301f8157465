import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.storage import log_file
from orchestrator.storage.directory import DirectoryObjects
from orchestrator.storage.log_file import flush_logs, log_to, log_to_objects
from orchestrator.storage.objects import Objects


@pytest.fixture
def logger() -> logging.Logger:
    return logging.getLogger("orchestrator.test")


def test_lines_are_in_the_file_once_they_are_flushed(tmp_path: Path, logger: logging.Logger) -> None:
    path = tmp_path / "logs" / "controller.log"  # its directory does not exist yet
    before = list(logging.getLogger("orchestrator").handlers)
    log_to(path)
    try:
        logger.info("the %s line", "first")
        flush_logs(60.0)
        assert path.read_text().rstrip().endswith("INFO orchestrator.test the first line")
    finally:
        logging.getLogger("orchestrator").handlers[:] = before


def test_a_line_does_not_wait_for_storage_that_hangs(
    tmp_path: Path, logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = threading.Event()
    monkeypatch.setattr(log_file, "MOST_WAITING", 3)
    monkeypatch.setattr(log_file._LogFile, "emit", lambda self, record: opened.wait(120.0))
    before = list(logging.getLogger("orchestrator").handlers)
    log_to(tmp_path / "controller.log")
    try:
        began_s = time.monotonic()
        for number in range(10):  # more than may wait: the last ones are dropped
            logger.info("line %d", number)
        assert time.monotonic() - began_s < 60.0  # a single line takes two minutes to write
        opened.set()
        flush_logs(60.0)
    finally:
        logging.getLogger("orchestrator").handlers[:] = before


def lines_in(objects: Objects, folder: str) -> list[str]:
    """The texts of the lines in all objects, in the order of their names."""
    parts = [objects.get(f"{folder}/{name}").decode() for name in objects.names(folder)]
    return [line.partition("orchestrator.test ")[2] for line in "".join(parts).splitlines()]


@pytest.fixture
def handlers() -> Iterator[None]:
    before = list(logging.getLogger("orchestrator").handlers)
    yield
    logging.getLogger("orchestrator").handlers[:] = before


@pytest.mark.usefixtures("handlers")
def test_lines_are_in_objects_once_they_are_flushed(tmp_path: Path, logger: logging.Logger) -> None:
    objects = DirectoryObjects(tmp_path)
    log_to_objects(objects, "logs/w0")
    for number in range(1_200):
        logger.info("line %d", number)
    flush_logs(60.0)
    assert lines_in(objects, "logs/w0") == [f"line {number}" for number in range(1_200)]
    assert 3 <= len(objects.names("logs/w0")) <= 10
    logger.info("later")
    flush_logs(60.0)
    assert lines_in(objects, "logs/w0")[-1] == "later"


@pytest.mark.usefixtures("handlers")
def test_lines_are_stored_after_some_time(
    tmp_path: Path, logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_file, "PART_S", 0.2)
    objects = DirectoryObjects(tmp_path)
    log_to_objects(objects, "logs/w0")
    logger.info("alone")
    deadline_s = time.monotonic() + 60.0
    while not objects.names("logs/w0"):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    assert lines_in(objects, "logs/w0") == ["alone"]


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("is_stored", [False, True], ids=["lost", "reply lost"])
def test_lines_that_storage_refuses_are_stored_once_later(
    tmp_path: Path, logger: logging.Logger, monkeypatch: pytest.MonkeyPatch, is_stored: bool
) -> None:
    monkeypatch.setattr(log_file, "PART_S", 0.05)
    objects, refused = DirectoryObjects(tmp_path), threading.Event()

    class Refusing:
        def create(self, key: str, data: bytes) -> bytes:
            if refused.is_set():
                return objects.create(key, data)
            if is_stored:
                objects.create(key, data)
            refused.set()
            raise OSError(5, "Input/output error")

    log_to_objects(Refusing(), "logs/w0")
    logger.info("first")
    assert refused.wait(60.0)
    logger.info("second")
    flush_logs(60.0)
    assert lines_in(objects, "logs/w0") == ["first", "second"]
