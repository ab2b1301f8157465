"""Data preparation in a process of its own: a store made or found, and the tokenizer saved with the run."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from orchestrator.data.prepare import check_enough, prepare
from orchestrator.spec.job import JobSpec


@dataclass(frozen=True)
class PreparedData:
    """A token store that is complete and large enough for the job."""

    store_dir: str
    vocab_size: int
    tokenizer: str  # file in the run's directory


class Preparation:
    """Hosted by `control.host`, so that control itself loads no tokenizer. Its methods may run at once."""

    def __init__(self) -> None:
        self._progress = ("reading", 0.0)

    def progress(self) -> tuple[str, float]:
        """The stage, and the fraction of it that is done."""
        return self._progress

    def prepare(self, job_json: str, run_dir: str, data_dir: str) -> PreparedData:
        """Make or find the job's token store below `data_dir`.

        Raises:
            DataError: a corpus that can't be read, or is too small for the job.
            StoreCorrupt: a store that doesn't match its digests.
        """
        job = JobSpec.model_validate_json(job_json)
        data = job.data
        store = prepare(data.source, data.vocab_size, data.holdout, Path(data_dir), self._tell, data.text_key)
        check_enough(store, job.train.sequence_length, job.train.global_batch_size, int(job.eval.every is not None))
        tokenizer = Path(run_dir) / "tokenizer.json"
        shutil.copyfile(store.tokenizer_path, tokenizer)
        return PreparedData(str(store.directory), store.vocab_size, str(tokenizer))

    def _tell(self, stage: str, fraction: float) -> None:
        self._progress = (stage, fraction)
