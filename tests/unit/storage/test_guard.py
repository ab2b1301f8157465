import errno
import threading
import time
from pathlib import Path

import pytest

from orchestrator.errors import NotFound, StorageError
from orchestrator.storage.guard import MOST_HUNG, StorageGuard

HUNG, WELL = Path("/hung"), Path("/well")


def _fails() -> None:
    raise NotFound("no such run")


def test_a_call_returns_or_raises_what_it_does() -> None:
    guard = StorageGuard()
    assert guard.call(WELL, 20.0, lambda: 3) == 3
    with pytest.raises(NotFound, match="no such run"):
        guard.call(WELL, 20.0, _fails)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TimeoutError(errno.ETIMEDOUT, "no answer in time", "s3://runs/x"), "no answer in time: s3://runs/x"),
        (TimeoutError("its own"), "its own: /well"),
        (PermissionError(errno.EACCES, "Permission denied", "/well/x"), "Permission denied: /well/x"),
    ],
    ids=str,
)
def test_an_error_of_the_system_is_one_of_storage(error: OSError, words: str) -> None:
    def fails() -> None:
        raise error

    with pytest.raises(StorageError) as raised:
        StorageGuard().call(WELL, 20.0, fails)
    assert raised.value.message == f"run storage /well can't be read or written: {words}"
    assert raised.value.__cause__ is error


def test_a_write_that_comes_too_late_is_undone() -> None:
    guard, opened, undone = StorageGuard(), threading.Event(), threading.Event()
    with pytest.raises(StorageError, match="no answer within 0.05 s"):
        guard.call(HUNG, 0.05, lambda: opened.wait(600.0), undo=undone.set)
    assert not undone.is_set()
    opened.set()
    assert undone.wait(20.0)
    assert guard.call(WELL, 20.0, lambda: "written", undo=undone.clear) == "written" and undone.is_set()


def test_storage_that_hangs_delays_no_other_storage_and_works_again_later() -> None:
    guard, opened = StorageGuard(), threading.Event()
    for _ in range(MOST_HUNG):
        with pytest.raises(StorageError, match="/hung hangs: no answer within 0.05 s"):
            guard.call(HUNG, 0.05, lambda: opened.wait(600.0))
    begun: list[str] = []
    with pytest.raises(StorageError, match="earlier calls have not returned"):  # it doesn't wait for this one
        guard.call(HUNG, 600.0, lambda: begun.append("another"))
    assert begun == []
    assert guard.call(WELL, 20.0, lambda: "read") == "read"
    opened.set()
    deadline_s = time.monotonic() + 20.0
    while guard._hung[HUNG] and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert guard.call(HUNG, 20.0, lambda: "read") == "read"
