"""The child process for storage calls: real processes, a real file system that is frozen."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from orchestrator.errors import StorageError
from orchestrator.storage.caller import CalledObjects
from orchestrator.storage.directory import DirectoryObjects
from orchestrator.storage.storage_process import MOST_ABANDONED, MOST_STARTS, StorageProcess
from tests.support.disk import ext4_disk, frozen

PATIENCE_S = 60.0
WRITER = """
import sys
from pathlib import Path
from orchestrator.storage.storage_process import StorageProcess
process = StorageProcess("test")
process.call(Path(sys.argv[1]).exists)
print(process.pid, flush=True)
process.call(Path(sys.argv[1]).write_bytes, b"1")
print("written", flush=True)
process.call(sys.stdin.read)
"""


@pytest.fixture
def process() -> Iterator[StorageProcess]:
    process = StorageProcess("test")
    yield process
    process.close()


def _fail_oddly() -> None:
    class Odd(Exception):
        pass

    raise Odd("of a class that exists here only")


def _log_and_print(text: str) -> int:
    logging.getLogger("orchestrator.test").warning("a line of %s", text)
    print("no answer")
    return os.getpid()


def _refuse(value: int) -> None:
    raise StorageError(f"{value} is refused", remedy="Try another.", unchanged="Nothing was written.")


def _end_at_first(marks: Path) -> str:
    """End the process in the first call."""
    marks.open("a").write("x")
    if marks.stat().st_size == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def test_calls_are_made_elsewhere_and_what_they_log_is_logged_here(
    process: StorageProcess, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "orchestrator"):
        assert process.call(_log_and_print, "the child") == process.pid != os.getpid()
    assert [record.getMessage() for record in caplog.records] == ["a line of the child"]


def test_errors_arrive_as_they_were_raised(process: StorageProcess, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as absent:
        process.call((tmp_path / "absent").read_bytes)
    assert absent.value.filename == str(tmp_path / "absent")
    with pytest.raises(StorageError) as refused:
        process.call(_refuse, 7)
    assert "7 is refused" in str(refused.value) and refused.value.remedy == "Try another."
    with pytest.raises(RuntimeError, match="of a class that exists here only"):
        process.call(_fail_oddly)
    assert process.call(os.getpid) == process.pid  # it goes on


def test_objects_are_the_same_from_another_process(process: StorageProcess, tmp_path: Path) -> None:
    objects = CalledObjects(DirectoryObjects(tmp_path), process.call)
    assert objects.create("journal/1", b"mine") == b"mine"
    assert objects.create("journal/1", b"another") == b"mine"
    assert (objects.names("journal"), objects.get("journal/1")) == (("1",), b"mine")
    objects.delete(name for name in ("journal/1", "journal/2"))
    assert objects.names("journal") == ()


def test_a_call_is_repeated_if_the_child_ends_during_it(process: StorageProcess, tmp_path: Path) -> None:
    first = process.call(os.getpid)
    assert process.call(_end_at_first, tmp_path / "marks") == "done"
    assert (tmp_path / "marks").read_text() == "xx" and process.pid != first


def test_a_call_that_always_ends_the_child_is_an_error_of_storage(process: StorageProcess) -> None:
    with pytest.raises(OSError, match=f"ended {MOST_STARTS} times"):
        process.call(os._exit, 3)
    assert process.call(os.getpid) == process.pid


def test_a_process_whose_storage_hangs_can_be_killed_and_its_child_ends_afterwards(tmp_path: Path) -> None:
    """The same call in a thread of the process itself would keep it until the file system answers."""
    with ext4_disk(tmp_path / "disk", 16) as disk:
        with frozen(disk):
            writer = _writer(disk / "file")
            child = psutil.Process(int(writer.stdout.readline()))  # type: ignore[union-attr]
            _await_hang(child)
            writer.kill()
            assert writer.wait(PATIENCE_S) == -signal.SIGKILL
            assert child.is_running()  # nothing can end it now
        child.wait(PATIENCE_S)


def _wait_for_ever_at_first(marks: Path) -> int:
    """Make no progress in the first call."""
    with marks.open("a") as file:
        file.write("x")
    if marks.stat().st_size == 1:
        signal.pause()
    return os.getpid()


def _compute(seconds: float) -> int:
    ends_s = time.process_time() + seconds
    while time.process_time() < ends_s:
        pass
    return os.getpid()


def test_a_call_without_progress_is_made_again_by_another_child(tmp_path: Path) -> None:
    process = StorageProcess("test", stuck_s=2.0)
    first = process.call(os.getpid)
    assert process.call(_compute, 3.0) == first  # longer, but not stuck
    assert process.call(_wait_for_ever_at_first, tmp_path / "marks") == process.pid != first
    assert not psutil.pid_exists(first) and (tmp_path / "marks").read_text() == "xx"
    process.close()


def test_children_that_cannot_be_killed_are_few_and_their_call_succeeds_once_storage_answers(tmp_path: Path) -> None:
    with ext4_disk(tmp_path / "disk", 16) as disk, ThreadPoolExecutor(1) as pool:
        process = StorageProcess("test", stuck_s=1.0)
        children = {process.call(os.getpid)}
        with frozen(disk):
            written = pool.submit(process.call, DirectoryObjects(disk).create, "key", b"value")
            ends_s = time.monotonic() + 12.0  # the third child would be replaced after 1 + 2 + 4 s
            while time.monotonic() < ends_s:
                children |= {pid for pid in [process.pid] if pid is not None}
                time.sleep(0.1)
        assert written.result(PATIENCE_S) == b"value" and len(children) == 1 + MOST_ABANDONED
        assert DirectoryObjects(disk).names("") == ("key", "lost+found")
        process.close()


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    writer = _writer(tmp_path / "file")
    child = psutil.Process(int(writer.stdout.readline()))  # type: ignore[union-attr]
    assert writer.stdout.readline() == "written\n"  # type: ignore[union-attr]
    writer.kill()
    child.wait(PATIENCE_S)


def _writer(path: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _await_hang(child: psutil.Process) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while child.status() != psutil.STATUS_DISK_SLEEP:
        assert time.monotonic() < deadline_s, f"the child is {child.status()}"
        time.sleep(0.01)
