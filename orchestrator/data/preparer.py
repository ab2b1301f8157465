"""Data preparation as an object that a process of its own can hold, so that who asks for it needs none of this room.

A controller starts it by its dotted name, calls `prepare` once and `progress` meanwhile from another thread.
"""

from dataclasses import dataclass

from orchestrator.data.prepare import check_enough, prepare
from orchestrator.data.store import TokenStore


@dataclass(frozen=True)
class PreparedData:
    """Where the store lies and what a run needs to know of it."""

    store_dir: str
    digest: str
    tokenizer_file: str
    vocab_size: int  # the trained tokenizer's: may be less than asked for
    train_tokens: int
    train_rows: int  # at the job's sequence length
    validation_rows: int


class Preparer:
    """Prepares one store. `prepare` and `progress` may run in different threads."""

    def __init__(self) -> None:
        self._progress = ("reading", 0.0)

    def prepare(
        self,
        source: str,
        vocab_size: int,
        holdout: float,
        directory: str,
        sequence_length: int,
        global_batch_size: int,
        min_validation_rows: int = 0,
    ) -> PreparedData:
        """`prepare` and `check_enough` in one. Raises DataError and StoreCorrupt as they do."""
        store = prepare(source, vocab_size, holdout, directory, self._tell)
        check_enough(store, sequence_length, global_batch_size, min_validation_rows)
        return _describe(store, sequence_length)

    def progress(self) -> tuple[str, float]:
        """The stage and the fraction of it that is done."""
        return self._progress

    def _tell(self, stage: str, fraction: float) -> None:
        self._progress = (stage, fraction)


def _describe(store: TokenStore, sequence_length: int) -> PreparedData:
    return PreparedData(
        store_dir=str(store.directory),
        digest=store.digest,
        tokenizer_file=str(store.tokenizer_path),
        vocab_size=store.vocab_size,
        train_tokens=store.num_tokens("train"),
        train_rows=store.num_rows("train", sequence_length),
        validation_rows=store.num_rows("validation", sequence_length),
    )
