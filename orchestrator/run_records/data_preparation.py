"""Data preparation in its own process: makes or finds the token store, and saves the tokenizer with the run."""

from dataclasses import dataclass
from pathlib import Path

from orchestrator.data.prepare.job_store import check_enough, check_vocabulary, prepare
from orchestrator.data.sample_order import Orders
from orchestrator.protocol.events.base import Event
from orchestrator.spec.data import BY_DOCUMENT
from orchestrator.spec.job import JobSpec
from orchestrator.tracking.sink import Dataset


@dataclass(frozen=True)
class PreparedData:
    """A token store that is complete and large enough for the job."""

    store_dir: str
    vocab_size: int
    tokenizer: str  # file in the run's directory
    datasets: tuple[Dataset, ...] = ()  # the data as a tracker shows it


@dataclass(frozen=True)
class DataPrepared(Event, kind="prepared", internal=True):
    """The token store is complete."""

    data: PreparedData


class Preparation:
    """Hosted by `cluster.actors.Host`, so the control layer loads no tokenizer. Its methods may run concurrently."""

    def __init__(self) -> None:
        self._progress = ("reading", 0.0)

    def progress(self) -> tuple[str, float]:
        """The stage of preparation, and the fraction of it that is done."""
        return self._progress

    def prepare(self, job_json: str, run_dir: str, data_dir: str) -> PreparedData:
        """Make or find the job's token store below `data_dir`.

        Raises:
            DataError: a corpus that can't be read, or is too small for the job.
            StoreCorrupt: a store that doesn't match its digests.
        """
        job = JobSpec.model_validate_json(job_json)
        data = job.data
        store = prepare(
            data.source,
            data.vocab_size,
            data.holdout,
            Path(data_dir),
            self._tell,
            text_key=data.text_key,
            tokenizer=None if data.tokenizer is None else Path(data.tokenizer),
            difficulty=None if job.curriculum is None else job.curriculum.signal,
            code_dir=Path("." if job.curriculum is None else job.curriculum.code_dir),
        )
        check_vocabulary(job.model.vocab_size, store.vocab_size)
        check_enough(
            store,
            job.train.sequence_length,
            job.train.global_batch_size,
            int(job.eval.every is not None),
            by_document=job.data.row_format == BY_DOCUMENT,
        )
        Orders(job, store)  # shows what a curriculum lacks, before any worker has the store
        tokenizer = Path(run_dir) / "tokenizer.json"
        store.tokenizer().save(tokenizer)
        datasets = tuple(
            Dataset(
                f"{source.name}/{split}", split, source.digest, data.source, counts.num_documents, counts.num_tokens
            )
            for source in store.manifest.sources
            for split, counts in store.manifest.splits.items()
        )
        return PreparedData(str(store.directory), store.vocab_size, str(tokenizer), datasets)

    def _tell(self, stage: str, fraction: float) -> None:
        self._progress = (stage, fraction)
