"""Which places of the code each test reaches, also in processes that a test starts: a plugin of pytest.

    REACHED_DIR=DIR pytest -p tests.support.reached_places

The code calls `mark(NUMBER)` at each place. `DIR/reached` then has a line `NUMBER TEST` for each place that a test
reached, and `DIR/durations` a line `SECONDS TEST` for each test. Forked processes know their test by a file that the
one of pytest keeps, and by the variable in which pytest-xdist names it.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

_marked: set[tuple[int, str]] = set()


def mark(number: int) -> None:
    """Note that this place was reached."""
    if "REACHED_DIR" in os.environ:
        test = _current().read_text() if _current().exists() else ""
        if (number, test) not in _marked:
            _marked.add((number, test))
            _append("reached", f"{number} {test}")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    _current().write_text(item.nodeid)
    began_s = time.monotonic()
    yield
    _append("durations", f"{time.monotonic() - began_s:.3f} {item.nodeid}")


def _current() -> Path:
    return Path(os.environ["REACHED_DIR"], "current-" + os.environ.get("PYTEST_XDIST_WORKER", "alone"))


def _append(name: str, line: str) -> None:
    with Path(os.environ["REACHED_DIR"], name).open("a") as file:
        file.write(line + "\n")
