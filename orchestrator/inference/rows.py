"""Rows of a corpus without a token store: tokens of all documents back to back, none left out.

Rows are split as in a store (`orchestrator.data.store`), except that the last one may be shorter.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.corpus.sources import Document
from orchestrator.data.store import IGNORED_TARGET, Rows
from orchestrator.data.tokenizer import TextTokenizer

DOCUMENTS_AT_ONCE = 64


def rows_of_documents(
    documents: Iterable[Document], tokenizer: TextTokenizer, sequence_length: int, rows_at_once: int
) -> Iterator[Rows]:
    """Yield batches of up to `rows_at_once` rows; a shorter last row is a batch of its own."""
    batch_tokens = rows_at_once * sequence_length
    tokens_U, starts_U = np.empty(0, np.int64), np.empty(0, np.bool_)
    for some in _encoded(documents, tokenizer):
        tokens_U = np.concatenate((tokens_U, *some))
        starts_U = np.concatenate((starts_U, *(_start(len(document)) for document in some)))
        while len(tokens_U) > batch_tokens:
            yield _cut(tokens_U[: batch_tokens + 1], starts_U[: batch_tokens + 1], sequence_length)
            tokens_U, starts_U = tokens_U[batch_tokens:], starts_U[batch_tokens:]
    whole = (len(tokens_U) - 1) // sequence_length * sequence_length
    if whole > 0:
        yield _cut(tokens_U[: whole + 1], starts_U[: whole + 1], sequence_length)
    rest = len(tokens_U) - 1 - whole
    if rest > 0:
        yield _cut(tokens_U[whole:], starts_U[whole:], rest)


def _encoded(documents: Iterable[Document], tokenizer: TextTokenizer) -> Iterator[list[NDArray[np.int64]]]:
    texts: list[str] = []
    for document in documents:
        texts.append(document.text)
        if len(texts) == DOCUMENTS_AT_ONCE:
            yield [np.asarray(tokens, np.int64) for tokens in tokenizer.encode(texts)]
            texts = []
    if texts:
        yield [np.asarray(tokens, np.int64) for tokens in tokenizer.encode(texts)]


def _start(length: int) -> NDArray[np.bool_]:
    starts = np.zeros(length, np.bool_)
    starts[0] = True
    return starts


def _cut(tokens_U: NDArray[np.int64], starts_U: NDArray[np.bool_], length: int) -> Rows:
    """Split R * length + 1 tokens into R rows."""
    shape = (-1, length)
    documents_RT = starts_U[:-1].reshape(shape).cumsum(1, dtype=np.int32)
    return Rows(
        inputs_RT=tokens_U[:-1].reshape(shape),
        targets_RT=np.where(starts_U[1:], IGNORED_TARGET, tokens_U[1:]).reshape(shape),
        documents_RT=documents_RT - documents_RT[:, :1],
    )
