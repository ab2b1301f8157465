"""Data that a run's preparation has made, and the interface of that process, whose module needs a tokenizer."""

from dataclasses import dataclass
from typing import Protocol

from orchestrator.protocol.events.base import Event
from orchestrator.storage.condition import StorageTrouble
from orchestrator.tracking.sinks.sink import Dataset


@dataclass(frozen=True)
class PreparedData:
    """A token store that is complete and large enough for the job."""

    store_dir: str  # its location
    vocab_size: int
    tokenizer: str  # location of its file
    datasets: tuple[Dataset, ...] = ()  # the data as a tracker shows it


@dataclass(frozen=True)
class PreparationProgress:
    """The stage of preparation, and the fraction of it that is done. `trouble`: why it is tried again."""

    stage: str = "reading"
    share: float = 0.0
    trouble: StorageTrouble | None = None


@dataclass(frozen=True)
class DataPrepared(Event, kind="prepared", internal=True):
    """The token store is complete."""

    data: PreparedData


class PreparationApi(Protocol):
    """A run's preparation (`orchestrator.run_records.data_preparation.Preparation`). Methods may run concurrently."""

    def prepare(self, job_json: str, run_dir: str, data_dir: str) -> PreparedData:
        """Make or find the job's token store, and save its tokenizer with the run."""

    def progress(self) -> PreparationProgress:
        """How far it has come."""
