"""A directory of objects that hangs, or refuses to create any, for as long as a test likes."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.storage.directory import DirectoryObjects


class HeldObjects(DirectoryObjects):
    """`Objects` in a directory."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        super().__init__(root)
        self._is_free = threading.Event()
        self._is_free.set()
        self._refusal: OSError | None = None

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """Let creations hang while this lasts."""
        self._is_free.clear()
        try:
            yield
        finally:
            self._is_free.set()

    @contextmanager
    def refusing(self, error: OSError) -> Iterator[None]:
        """Let creations raise this error while this lasts."""
        self._refusal = error
        try:
            yield
        finally:
            self._refusal = None

    def create(self, key: str, data: bytes) -> bytes:
        assert self._is_free.wait(60.0)
        if self._refusal is not None:
            raise self._refusal
        return super().create(key, data)
