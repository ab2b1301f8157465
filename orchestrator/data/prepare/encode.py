"""Tasks on a block, on any node: a sample of its text for the tokenizer, and its tokens as a part file.

Tasks and results are JSON. A result may be an error, so that its message arrives unchanged.
"""

import errno
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.corpus.sources import Document
from orchestrator.data.holdout import fraction_of
from orchestrator.data.prepare.block_cache import checked, written
from orchestrator.data.prepare.blocks import Located, RecordBlock, documents_of
from orchestrator.data.prepare.difficulty import Signal, Tokens, scores, signal_of
from orchestrator.data.prepare.store_writer import token_dtype
from orchestrator.data.prepare.word_cache import WordCache, has_words
from orchestrator.data.tokenizer import TextTokenizer
from orchestrator.errors import DataError, DataNotWritten
from orchestrator.protocol.codec import from_plain, to_plain

PART_FORMAT = 1
BATCH_CHARS = 1 << 18  # encoded at once; the tokenizer's own working memory is some 50 bytes per character
# Signals that need counts over the training split, so documents are scored at the end.
OVER_ALL_DOCUMENTS = frozenset({"rarity", "reference_loss"})
Encode = Callable[[Sequence[str]], list[NDArray[np.unsignedinteger]]]


@dataclass(frozen=True)
class SampleTask:
    block: RecordBlock
    share: float  # of each document
    held_out: tuple[int, ...]  # documents of the block, from 0, that the tokenizer must not see


@dataclass(frozen=True)
class EncodeTask:
    block: RecordBlock
    part: str  # file to write
    tokenizer: str  # file
    tokenizer_digest: str
    signal: str | None  # signal that this task scores documents by
    code_dir: str = "."  # directory of a user's own signal


@dataclass(frozen=True)
class EncodedBlock:
    """Result of a task: texts of a sample, the number of tokens written, or an error."""

    block: int
    texts: tuple[str, ...] = ()
    num_tokens: int = 0
    error: str = ""
    remedy: str = ""
    unchanged: str = ""
    errno: int = 0  # of a part that can't be written


def saved(task: SampleTask | EncodeTask) -> str:
    return json.dumps(to_plain(task))


def outcomes(results: Iterable[str]) -> Iterator[EncodedBlock]:
    """Results of tasks in order of arrival. Raises DataError for the first that failed."""
    for result in results:
        outcome = from_plain(EncodedBlock, json.loads(result))
        if outcome.errno:
            refused = OSError(outcome.errno, os.strerror(outcome.errno))
            raise DataNotWritten(outcome.error, remedy=outcome.remedy, unchanged=outcome.unchanged) from refused
        if outcome.error:
            raise DataError(outcome.error, remedy=outcome.remedy, unchanged=outcome.unchanged)
        yield outcome


def signal_here(difficulty: str | None) -> str | None:
    """The signal, if a document's score depends on the document alone; else None."""
    return None if difficulty in OVER_ALL_DOCUMENTS else difficulty


def made_of(block: RecordBlock, tokenizer_digest: str, signal: str | None) -> str:
    """Digest of all inputs of a part."""
    return hashlib.sha256(f"{PART_FORMAT}\n{block.digest}\n{tokenizer_digest}\n{signal}".encode()).hexdigest()


def sample_block(task_json: str) -> str:
    """Execute a `SampleTask`."""
    task = from_plain(SampleTask, json.loads(task_json))

    def sample() -> EncodedBlock:
        held_out = frozenset(task.held_out)
        found = enumerate(documents_of(task.block))
        texts = tuple(sample_of(item.document, task.share) for number, item in found if number not in held_out)
        return EncodedBlock(task.block.number, texts)

    return _told(task.block, sample)


def sample_of(document: Document, share: float) -> str:
    """A share of a document, at a position given by a hash of its id."""
    length = math.ceil(len(document.text) * share)
    start = int(fraction_of(document.id) * (len(document.text) - length + 1))
    return document.text[start : start + length]


def encode_block(task_json: str) -> str:
    """Execute an `EncodeTask`; a valid existing part is kept."""
    task = from_plain(EncodeTask, json.loads(task_json))
    return _told(task.block, lambda: _encode(task))


def _told(block: RecordBlock, work: Callable[[], EncodedBlock]) -> str:
    try:
        outcome = work()
    except DataError as error:
        outcome = EncodedBlock(block.number, error=error.message, remedy=error.remedy, unchanged=error.unchanged)
    except OSError as error:
        outcome = EncodedBlock(
            block.number,
            error=f"a part of the store can't be written: {error}",
            remedy="Make room, and have every node see the corpus and the directory of the store under the same path.",
            unchanged="No store was written; what is done is kept.",
            errno=error.errno or errno.EIO,
        )
    return json.dumps(to_plain(outcome))


def _encode(task: EncodeTask) -> EncodedBlock:
    path, made = Path(task.part), made_of(task.block, task.tokenizer_digest, task.signal)
    footer = checked(path, made)
    if footer is not None:
        return EncodedBlock(task.block.number, num_tokens=footer.num_tokens)
    tokenizer, encode = _loaded(task.tokenizer, task.tokenizer_digest)
    signal = None
    if task.signal is not None:
        signal = signal_of(task.signal, tokenizer, _no_counts, _no_counts, False, Path(task.code_dir))
    with written(path, made, token_dtype(tokenizer)) as part:
        for batch in _batches(documents_of(task.block)):
            for item, tokens in zip(batch, encode([item.document.text for item in batch]), strict=True):
                part.add(tokens, float("nan") if signal is None else _score(signal, task.signal or "", item, tokens))
        num_tokens = part.num_tokens
    return EncodedBlock(task.block.number, num_tokens=num_tokens)


def _score(signal: Signal, name: str, item: Located, tokens: Tokens) -> float:
    return float(scores(signal, name, iter([(f"{item.document.id} ({item.where})", tokens)]))[0])


def _batches(documents: Iterator[Located]) -> Iterator[list[Located]]:
    batch: list[Located] = []
    num_chars = 0
    for item in documents:
        batch.append(item)
        num_chars += len(item.document.text)
        if num_chars >= BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


@lru_cache(maxsize=1)
def _loaded(path: str, digest: str) -> tuple[TextTokenizer, Encode]:
    """The tokenizer and its encoding function for one core. A process loads it once for all its blocks, and caches
    the words that it has seen; the digest detects another tokenizer."""
    found = TextTokenizer.load(Path(path))
    if found.digest != digest:
        raise DataError(
            f"{path} is not the tokenizer that this store is made with",
            remedy="Start again.",
            unchanged="No store was written.",
        )
    if has_words(found):
        return found, WordCache(found).encode
    dtype = token_dtype(found)
    return found, lambda texts: [np.asarray(tokens, dtype) for tokens in found.encode(texts)]


def _no_counts() -> NoReturn:
    raise AssertionError("counts over all documents aren't known in a block")
