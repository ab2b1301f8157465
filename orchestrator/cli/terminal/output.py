"""Output of commands: data on stdout, as greppable text or JSON; messages and errors on stderr."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from functools import cache
from typing import Any

from rich.console import Console
from rich.markup import escape

from orchestrator.errors import DataError, JobDoesNotFit, OrchestratorError, TracedError
from orchestrator.protocol.codec import to_plain
from orchestrator.submission.waiting import WAITING


class Format(StrEnum):
    """How data is written to stdout."""

    TEXT = "text"
    JSON = "json"


@cache
def stderr() -> Console:
    """The console for messages. Rich omits colours where NO_COLOR is set or stderr is not a terminal."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def narrate(text: str) -> None:
    """Print a message to stderr."""
    stderr().print(escape(text))


def narrate_wait(error: JobDoesNotFit) -> None:
    """Print what a submission waits for, whenever that has changed."""
    _narrate_once(f"{WAITING}: {error.message}.")


@cache
def _narrate_once(text: str) -> None:
    narrate(text)


def show(text: str) -> None:
    """Write data to stdout."""
    sys.stdout.write(text + "\n")


def show_json(value: Any) -> None:
    show(json.dumps(value, indent=2))


def show_answer(output: Format, value: Any, text: str | None = None) -> None:
    """Write what a command answers: the value as JSON, or its text. None: what is narrated is enough for users."""
    if output is Format.JSON:
        show_json(to_plain(value))
    elif text is not None:
        show(text)


def show_line(value: Any) -> None:
    """Write a value of a stream as one line of JSON, flushed for readers of a pipe."""
    show(json.dumps(value, separators=(",", ":")))
    sys.stdout.flush()


def show_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write left-aligned columns, as wide as they need to be, regardless of the terminal's width."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        show("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def show_error(error: OrchestratorError) -> None:
    """Print the message, the remedy and what stayed unchanged; before them the traceback of an error of a worker or of
    user-defined code."""
    console = stderr()
    if isinstance(error, TracedError) and error.traceback:
        console.print(escape(error.traceback.rstrip()))
    console.print(f"[bold red]error:[/] {escape(error.message)}")
    for line in (error.remedy, error.unchanged):
        if line:
            console.print(escape(line))


@contextmanager
def in_words_of_options(options: Mapping[str, str], writes: bool = True) -> Iterator[None]:
    """Replace names of the library, the keys of `options`, in error messages by the command's. A command that writes
    nothing omits what stayed unchanged."""
    try:
        yield
    except DataError as error:
        for name, option in options.items():
            error.message = error.message.replace(name, option)
            error.remedy = error.remedy.replace(name, option)
        error.unchanged = error.unchanged if writes else ""
        raise
