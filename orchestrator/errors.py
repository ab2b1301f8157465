"""The tree of errors that users may see; each class has the exit code of the command that ends with it.

A message gives the value and the rule it broke, `remedy` the action to take, `unchanged` the state that was kept. They
are separate fields so that a terminal can format them, and all survive pickling, because errors cross processes.

    raise DataError("corpus /data/books holds no .txt file", remedy="Point data.source at a folder with text files.",
                    unchanged="Nothing was written.")
"""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import ClassVar


class OrchestratorError(Exception):
    """Root of all errors raised on purpose. Any other exception is a bug (exit code 70).

    Raised itself where something outside of this program fails: a process that ends by itself, a server that does not
    answer.

    Args:
        message: the value and the rule that it broke.
        remedy: the action for the user to take.
        unchanged: the state that the failed action left as it was.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, remedy: str = "", unchanged: str = "") -> None:
        super().__init__(message)  # pickle calls the class with args; the fields below travel in __dict__
        self.message = message
        self.remedy = remedy
        self.unchanged = unchanged

    def __str__(self) -> str:
        return " ".join(_sentence(part) for part in (self.message, self.remedy, self.unchanged) if part)


class UsageError(OrchestratorError):
    """An invalid request, or one that the job doesn't allow: the caller must change it."""

    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One mistake in a job file. `line` and `column` count from 1; `path` is dotted, empty for the whole file."""

    file: str
    line: int
    column: int
    path: str
    message: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}:{self.column}: "
        return f"{where}{self.path}: {self.message}" if self.path else where + self.message


class SpecError(UsageError):
    """A job file with mistakes: all of them, one per line, in the order of the file."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(
            "\n".join(str(problem) for problem in problems),
            remedy=f"{count}; `orchestrator job schema` lists every key",
            unchanged="Nothing was started.",
        )
        self.args = (problems,)
        self.problems = problems

    def __str__(self) -> str:
        return f"{self.message}\n{_sentence(self.remedy)} {self.unchanged}"


class NameTaken(UsageError):
    """A run of this name exists already."""


class DataError(UsageError):
    """A corpus that can't be read, or is too small for the job."""


class DataNotWritten(DataError):
    """Prepared data that can't be written now. Its cause is the OSError; trying again is safe."""


class TracedError(OrchestratorError):
    """An error with a cause in another process or in a user's code.

    Args:
        traceback: of the cause, where it raised.
    """

    def __init__(self, message: str, *, traceback: str = "", remedy: str = "", unchanged: str = "") -> None:
        super().__init__(message, remedy=remedy, unchanged=unchanged)
        self.traceback = traceback


class EntrypointError(TracedError, UsageError):
    """A user-defined model that can't be imported or built, or doesn't meet the requirements of training."""


class StorageError(OrchestratorError):
    """Run storage that can't be read or written: full, read-only or unavailable."""

    exit_code = 104


class StoreCorrupt(DataError):
    """A prepared data store whose files don't match their digests."""

    exit_code = 104


class CheckpointCorrupt(OrchestratorError):
    """A checkpoint whose files are missing, changed, or don't cover every tensor."""

    exit_code = 104


class ClusterUnreachable(OrchestratorError):
    """There is no cluster at the address, or it doesn't answer."""

    exit_code = 69


class NotAllowed(OrchestratorError):
    """The cluster refused a wrong or missing token; or the client refused an exposed cluster that requires no token, or
    a token that others may read."""

    exit_code = 77


class KeyUnknown(NotAllowed):
    """Records of a run that were signed with a key which this process doesn't have.

    Attributes:
        cluster: that of the writer, as with `TermSuperseded`: it isn't known, and is not this one.
    """

    cluster = "unknown"


class RunFailed(TracedError):
    """The run failed, with a named reason."""

    exit_code = 100


class JobDoesNotFit(OrchestratorError):
    """The cluster can't hold the workers that the job asks for."""

    exit_code = 105


class JournalCorrupt(OrchestratorError):
    """A run's journal with an entry that is missing, changed, or no entry."""

    exit_code = 104


class TermSuperseded(OrchestratorError):
    """A newer controller of this run exists; this one's term has ended and it must not write.

    Attributes:
        cluster: id of that controller's cluster; empty if it isn't known.
    """

    exit_code = 70
    cluster = ""


class ProtocolError(OrchestratorError):
    """A message that doesn't fit the receiver's state: a bug, or a process of another version."""

    exit_code = 70


class NotFinished(OrchestratorError):
    """The request needs a run that has ended, and this one has not."""

    exit_code = 101


class NotFound(OrchestratorError):
    """No such run, checkpoint or metric."""

    exit_code = 102


class RunStopped(OrchestratorError):
    """The run was stopped before its last step, by request."""

    exit_code = 103


def of_code(exit_code: int) -> type[OrchestratorError]:
    """The most general class of error with this exit code."""
    general = (
        *(UsageError, ClusterUnreachable, NotAllowed),
        *(RunFailed, NotFinished, NotFound, RunStopped, StorageError, JobDoesNotFit),
    )
    return next((kind for kind in general if kind.exit_code == exit_code), OrchestratorError)


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that suggests the known names most similar to this one; empty if none is."""
    found = [f"`{near}`" for near in get_close_matches(name, sorted(known), n=3, cutoff=0.5)]
    return f"Did you mean {' or '.join(found)}? " if found else ""


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else text + "."
