"""Secrets of a job: read on the node that runs its code, set in the environment, and redacted from its output.

A job only names the source of a secret, so no value is in the job file, in run storage, in Ray's listings or in MLflow.
"""

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from orchestrator.errors import UsageError

SHORTEST = 6  # characters; shorter values may be words that logs contain for other reasons
HIDDEN = "***"

_known: set[str] = set()


def take_secrets(secrets: Mapping[str, str]) -> None:
    """Set environment variables to the secrets that a job names as `file:PATH` or `env:NAME` on this node.

    Raises:
        UsageError: a secret is missing or can't be read. The message contains no value.
    """
    for name, reference in secrets.items():
        value = os.environ[name] = read_secret(name, reference)
        _known.add(value)
    if _known:
        for handler in logging.getLogger("orchestrator").handlers:
            handler.setFormatter(_Redacting(handler.formatter or logging.Formatter()))


def redacted(text: str) -> str:
    """A text without the secrets that this process knows."""
    return without(text, _known)


def without(text: str, values: Iterable[str]) -> str:
    """A text without these values; those of several lines are also hidden line by line."""
    parts = {part for value in values for part in (value, *value.splitlines()) if len(part) >= SHORTEST}
    for part in sorted(parts, key=len, reverse=True):  # one may contain another
        text = text.replace(part, HIDDEN)
    return text


def read_secret(name: str, reference: str) -> str:
    """The value of `file:PATH` or `env:NAME` on this node. Raises UsageError, without any value."""
    kind, _, where = reference.partition(":")
    value = os.environ.get(where) if kind == "env" else _read(name, Path(where))
    if value is None:
        raise UsageError(
            f"secret {name} is to come from the environment variable {where}, which this node doesn't have",
            remedy="Set it where Ray is started on every node, or name a file: file:/run/secrets/…",
        )
    return value


def _read(name: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(
            f"secret {name} can't be read from {path} on this node: {reason}",
            remedy="Every node that may have a worker needs the file, readable by the user that runs Ray there.",
        ) from None


class _Redacting(logging.Formatter):
    def __init__(self, plain: logging.Formatter) -> None:
        super().__init__()
        self._plain = plain

    def format(self, record: logging.LogRecord) -> str:
        return redacted(self._plain.format(record))
