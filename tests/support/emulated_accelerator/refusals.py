"""What CUDA would refuse, raised or counted, and the places where the host waits for the device."""

import os
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

_findings: "Counter[Finding] | None" = None
_syncs: Counter[str] | None = None


class DeviceError(RuntimeError):
    """What CUDA would have raised."""


@dataclass(frozen=True)
class Finding:
    """A refusal, and the innermost line of the program that caused it."""

    message: str
    where: str


def refuse(message: str, kind: type[Exception] = DeviceError) -> None:
    """Raise `kind`; within `survey` count it instead."""
    if _findings is None:
        raise kind(message)
    _findings[Finding(message, _place())] += 1


def count_sync(operation: str) -> None:
    """Count a wait of the host for the device, within `host_syncs`."""
    if _syncs is not None:
        _syncs[f"{_place()}: {operation}"] += 1


@contextmanager
def survey() -> Iterator["Counter[Finding]"]:
    """Count what CUDA would refuse instead of raising it."""
    global _findings
    before, _findings = _findings, Counter()
    try:
        yield _findings
    finally:
        _findings = before


@contextmanager
def host_syncs() -> Iterator[Counter[str]]:
    """Count the waits of the host for the device, by line and operation."""
    global _syncs
    before, _syncs = _syncs, Counter()
    try:
        yield _syncs
    finally:
        _syncs = before


def _place() -> str:
    """The innermost line that is neither torch's nor this package's."""
    hidden = (os.path.dirname(torch.__file__), os.path.dirname(__file__), "<")
    for frame, line in traceback.walk_stack(sys._getframe()):
        file = frame.f_code.co_filename
        if not file.startswith(hidden):
            return f"{file}:{line} {frame.f_code.co_qualname}"
    return "autograd"
