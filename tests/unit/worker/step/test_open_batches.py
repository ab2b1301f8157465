"""Data of a run that can't be read, or whose file system isn't mounted, when a worker starts."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import DataError
from orchestrator.storage.condition import StorageCondition, StorageTrouble
from orchestrator.worker.step import open_batches
from orchestrator.worker.step.open_batches import open_when_there

READER: Any = object()


def test_data_are_opened_once_storage_gives_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_batches, "AGAIN_S", 0.0)
    run_dir, troubles = tmp_path / "run", list[StorageTrouble | None]()
    errors = [
        OSError(errno.EIO, os.strerror(errno.EIO)),
        OSError(errno.EIO, os.strerror(errno.EIO)),
        DataError("no token store"),
        FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)),
    ]

    def open_data() -> Any:
        if errors:
            raise errors.pop(0)
        return READER

    assert open_when_there(open_data, run_dir, troubles.append) is READER
    first, second, last = troubles  # what is the same again isn't reported again
    assert first is not None and first.why == "the run's data can't be read: Input/output error"
    assert second is not None and "not mounted" in second.why and second.condition is StorageCondition.AWAY
    assert last is None


@pytest.mark.parametrize("error", [DataError("no token store"), FileNotFoundError(errno.ENOENT, "gone")])
def test_missing_data_of_an_existing_run_are_an_error(tmp_path: Path, error: Exception) -> None:
    def open_data() -> Any:
        raise error

    with pytest.raises(type(error)):
        open_when_there(open_data, tmp_path, lambda _: pytest.fail("storage is well"))
