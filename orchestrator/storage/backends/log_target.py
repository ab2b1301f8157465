"""Place of a process's log lines in a run's storage."""

from dataclasses import dataclass
from pathlib import Path

from orchestrator.storage.backends.location import Location, objects_at
from orchestrator.storage.caller import CalledObjects, Caller, call_here
from orchestrator.storage.log_file import log_to, log_to_objects

FOLDER = "logs"  # in the run's directory


@dataclass(frozen=True)
class LogTarget:
    """Log lines of one process: in a directory the file `logs/SOURCE.log`, in a bucket objects in `logs/SOURCE`.

    Args:
        run: location of the run.
        source: controller, tracker, or such, or a worker's id.
    """

    run: Location
    source: str

    def open(self, caller: Caller = call_here) -> None:
        """Send the lines of this process there."""
        if isinstance(self.run, Path):
            log_to(self.run / FOLDER / f"{self.source}.log", caller)
        else:
            log_to_objects(CalledObjects(objects_at(self.run), caller), f"{FOLDER}/{self.source}")
