"""Request to prepare a token store: its sources and options, checked before anything is read."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from orchestrator.data.corpus.sources import find_files
from orchestrator.data.manifest import PrepareOptions
from orchestrator.data.prepare.difficulty import HERE, check_signal
from orchestrator.data.tokenizer import TextTokenizer
from orchestrator.errors import DataError

Progress = Callable[[str, float], None]

TOKENIZER_TRAIN_BYTES = 8_000_000


@dataclass(frozen=True)
class Request:
    """Sources and options of a preparation.

    Args:
        sources: see `read_documents`.
        vocab_size: tokens to learn; little text may give fewer.
        holdout: fraction of documents in `validation`, in [0, 1); either split gets at least one.
        text_key: key or column of the text in files with rows.
        tokenizer: a `tokenizer.json` to use instead of training one; `vocab_size` is then ignored.
        difficulty: the signal that scores documents (`orchestrator.data.prepare.difficulty`); None for no scores.
        code_dir: directory of a user's own signal.
        min_chars, max_chars: shorter and longer documents are left out.
        deduplicate: keep only the first of documents with equal texts.
        weights: shares of the sources in the training split's tokens; None to use all documents.
        max_bad: largest allowed share of bad records.
    """

    sources: tuple[str, ...]
    vocab_size: int = 2048
    holdout: float = 0.05
    text_key: str = "text"
    tokenizer: Path | None = None
    difficulty: str | None = None
    min_chars: int | None = None
    max_chars: int | None = None
    deduplicate: bool = True
    weights: tuple[float, ...] | None = None
    max_bad: float = 0.001
    code_dir: Path = HERE


def check(request: Request) -> None:
    """Raises DataError for an option out of range, or a source that doesn't exist."""
    check_holdout(request.holdout)
    if request.difficulty is not None:
        check_signal(request.difficulty, request.code_dir)
    low, high, weights = request.min_chars, request.max_chars, request.weights
    if (low is not None and low < 1) or (high is not None and high < max(1, low or 1)):
        raise _refused(
            f"min_chars {low} and max_chars {high}", "both are at least 1, and the first not above the second"
        )
    if not 0 <= request.max_bad <= 1:
        raise _refused(f"max_bad {request.max_bad}", "it is a share of the records, from 0 to 1")
    for source in request.sources:
        find_files(source)
    if weights is None:
        return
    if len(weights) != len(request.sources) or len(weights) < 2:
        raise _refused(
            f"{len(weights)} weights for {len(request.sources)} sources", "each of several sources has one weight"
        )
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise _refused(
            f"weights {', '.join(map(str, weights))}", "they are numbers above 0; leave a source out instead"
        )


def check_holdout(holdout: float) -> None:
    """Raises DataError if it is out of range."""
    if not 0 <= holdout < 1:
        raise DataError(
            f"data.holdout is {holdout}; it must be at least 0 and less than 1",
            remedy="Set it to the fraction of documents to validate on, such as 0.05.",
            unchanged="Nothing was written.",
        )


def load_tokenizer(path: Path) -> TextTokenizer:
    """The tokenizer of a job. Raises DataError if it can't be read or used."""
    try:
        return TextTokenizer.load(path)
    except DataError as error:
        if str(path) in error.message:
            raise
        raise DataError(
            f"data.tokenizer {path}: {error.message}", remedy=error.remedy, unchanged=error.unchanged
        ) from error
    except OSError as error:
        raise DataError(
            f"data.tokenizer {path} can't be read: {error.strerror}",
            remedy="Name a tokenizer.json as the tokenizers library writes it.",
            unchanged="Nothing was started.",
        ) from error


def options_of(request: Request, given: TextTokenizer | None) -> PrepareOptions:
    """The options that determine the store, with the tokenizer that is `given`, if any."""
    return PrepareOptions(
        vocab_size=request.vocab_size if given is None else given.vocab_size,
        holdout=float(request.holdout),
        tokenizer_train_bytes=TOKENIZER_TRAIN_BYTES if given is None else 0,
        tokenizer=None if given is None else given.digest,
        difficulty=request.difficulty,
        min_chars=request.min_chars,
        max_chars=request.max_chars,
        deduplicate=True if request.deduplicate else None,
        weights=request.weights,
    )


def _refused(value: str, rule: str) -> DataError:
    return DataError(f"{value}: {rule}", unchanged="Nothing was written.")
