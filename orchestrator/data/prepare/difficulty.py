"""Difficulty of documents, by one of several signals: higher is harder.

Measurement must show which of them helps a model learn; a curriculum uses only their order.
"""

import math
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.tokenizer import TextTokenizer
from orchestrator.errors import DataError
from orchestrator.spec.curriculum import SIGNALS
from orchestrator.user_code import imported

# -- A small language model whose loss is a measure of difficulty: bigrams, interpolated with unigrams -----------------

CELL_BITS = 22
# Weight of the unigram, in pairs. Of 1, 5, 20, 50, 100, 200, 500 and 2,000, 100 gave the lowest loss on held-out files
# of Python's library, with 2,048, 8,192 and 32,768 tokens alike; 20 and 500 order documents almost the same.
PRIOR = 100
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, an odd number

Tokens = NDArray[np.integer]
Counts = NDArray[np.int64]


class PairCounts:
    """Counts of token pairs within documents, in 32 MiB for any number of documents: `add` each.

    Attributes:
        pairs_C: counts by the pair's cell. 8 bytes each: 4 would overflow in large corpora.
        firsts_V, seconds_V: number of pairs in which a token is the first, and the second.
        num_pairs: number of pairs in all documents.
    """

    def __init__(self, vocab_size: int) -> None:
        self.pairs_C: Counts = np.zeros(1 << CELL_BITS, np.int64)
        self.firsts_V: Counts = np.zeros(vocab_size, np.int64)
        self.seconds_V: Counts = np.zeros(vocab_size, np.int64)
        self.num_pairs = 0

    def add(self, tokens: Tokens) -> None:
        """Count a whole document. No pair spans two documents."""
        np.add.at(self.pairs_C, self.cells_of(tokens), 1)
        np.add.at(self.firsts_V, tokens[:-1], 1)
        np.add.at(self.seconds_V, tokens[1:], 1)
        self.num_pairs += max(0, len(tokens) - 1)

    def cells_of(self, tokens: Tokens) -> NDArray[np.uint64]:
        """The cell of each pair (T): its own for up to 2,048 tokens, when there are enough; else by multiplicative
        hashing (Knuth, "The Art of Computer Programming", volume 3, section 6.4)."""
        vocab_size = len(self.firsts_V)
        pairs_T = tokens[:-1].astype(np.uint64) * np.uint64(vocab_size) + tokens[1:].astype(np.uint64)
        return pairs_T if vocab_size**2 <= 1 << CELL_BITS else pairs_T * GOLDEN >> np.uint64(64 - CELL_BITS)


def reference_loss(counts: PairCounts, tokens: Tokens, was_added: bool) -> float:
    """Mean -log p of a document's tokens, each given the one before it, in nats; 0.0 for an empty document.

        p(b | a) = (c(a, b) + PRIOR p(b)) / (c(a) + PRIOR)    p(b) = (c(b) + 1) / (c + V)

    Jelinek-Mercer interpolation, the bigram's weight c(a) / (c(a) + PRIOR) growing with how often its context was seen
    (Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling", 1998, section 2.3), as a
    Dirichlet prior gives it (MacKay and Peto, "A Hierarchical Dirichlet Language Model", 1995). Witten-Bell uses the
    number of distinct tokens after `a` as PRIOR, which is unknown where pairs share cells.

    Args:
        was_added: the document is among those counted. Its own counts are then subtracted: a rare text must not be easy
            because the model has seen it.
    """
    cells_T, firsts_T, seconds_T = counts.cells_of(tokens), tokens[:-1], tokens[1:]
    if not len(cells_T):
        return 0.0
    pair_T, first_T, second_T = counts.pairs_C[cells_T], counts.firsts_V[firsts_T], counts.seconds_V[seconds_T]
    num_pairs = counts.num_pairs
    if was_added:
        pair_T -= _repeats(cells_T)
        first_T -= _repeats(firsts_T)
        second_T -= _repeats(seconds_T)
        num_pairs -= len(cells_T)
    # A pair can't be more frequent than its tokens. A cell shared with other pairs may count more: p would exceed 1.
    pair_T = np.minimum(pair_T, np.minimum(first_T, second_T))
    unigram_T = (second_T + 1) / (num_pairs + len(counts.seconds_V))
    return float(-np.log((pair_T + PRIOR * unigram_T) / (first_T + PRIOR)).mean())


def _repeats(values_T: NDArray[np.integer]) -> Counts:
    """Number of occurrences of each value."""
    _, place_T, counts = np.unique(values_T, return_inverse=True, return_counts=True)
    repeats_T: Counts = counts[place_T]
    return repeats_T


# -- Signals of difficulty: higher is harder ---------------------------------------------------------------------------

WINDOW = 50  # tokens
HERE = Path()
LARGEST = float(np.finfo(np.float32).max)  # limit of the index's float32
Signal = Callable[[Tokens], float]


def signal_of(
    name: str,
    tokenizer: TextTokenizer,
    counts: Callable[[], NDArray[np.int64]],
    pairs: Callable[[], PairCounts],
    is_training: bool,
    code_dir: Path = HERE,
) -> Signal:
    """A function that scores a document from its tokens.

    Args:
        name: a signal, or `package.module:score`, which gets the document's text.
        counts: token counts of the training split by vocabulary; called only if needed.
        pairs: token pair counts of the training split's documents; called only if needed.
        is_training: the documents to score are those of the training split.
        code_dir: directory of the user's own function.

    Raises:
        DataError: there is no such function.
    """
    if ":" in name:
        function = _imported(name, code_dir)
        return lambda tokens: float(function(_text(tokenizer, tokens)))
    if name == "length":
        return lambda tokens: float(len(tokens))
    if name == "compression":
        return lambda tokens: _compression(_text(tokenizer, tokens))
    if name == "rarity":
        surprisal_V = _surprisal(counts())
        return lambda tokens: float(surprisal_V[tokens[1:]].mean()) if len(tokens) > 1 else 0.0
    if name == "diversity":
        return diversity
    if name == "reference_loss":
        return partial(reference_loss, pairs(), was_added=is_training)
    raise ValueError(f"there is no signal {name}")


def check_signal(name: str, code_dir: Path = HERE) -> None:
    """Raises DataError if there is no such signal."""
    if ":" in name:
        _imported(name, code_dir)
    elif name not in SIGNALS:
        raise DataError(
            f"curriculum.signal {name}: it must be {', '.join(SIGNALS)} or a function as package.module:score",
            unchanged="Nothing was written.",
        )


def scores(signal: Signal, name: str, documents: Iterator[tuple[str, Tokens]]) -> NDArray[np.float64]:
    """Scores of (id, tokens) in order. Raises DataError with the id of a document that can't be scored."""
    found = []
    for document_id, tokens in documents:
        try:
            score = signal(tokens)
        except Exception as error:
            raise _without_score(name, document_id, f"raised {type(error).__name__}: {error}") from error
        if not math.isfinite(score) or abs(score) > LARGEST:
            raise _without_score(name, document_id, f"gave {score}")
        found.append(score)
    return np.array(found)


def diversity(tokens: Tokens) -> float:
    """Mean share of distinct tokens in windows of `WINDOW`: the moving-average type-token ratio, which unlike the plain
    one doesn't fall with length (Covington and McFall, "Cutting the Gordian Knot", Journal of Quantitative Linguistics,
    2010)."""
    tokens = tokens[1:]  # without the document token
    n = len(tokens)
    window = min(WINDOW, n)
    if n == 0:
        return 0.0
    by_token = np.argsort(tokens, kind="stable")
    before = np.full(n, -1)  # last position of the same token
    same = tokens[by_token[1:]] == tokens[by_token[:-1]]
    before[by_token[1:][same]] = by_token[:-1][same]
    place = np.arange(n)
    # A token counts in all windows that contain it but not its previous occurrence: the range of their starts.
    first = np.maximum(np.maximum(before + 1, place - window + 1), 0)
    last = np.minimum(place, n - window)
    return float(np.maximum(last - first + 1, 0).sum() / ((n - window + 1) * window))


def _surprisal(counts_V: NDArray[np.int64]) -> NDArray[np.float64]:
    """Surprisal of each token in nats, from its frequency with add-one smoothing."""
    surprisal_V: NDArray[np.float64] = -np.log((counts_V + 1) / (counts_V.sum() + len(counts_V)))
    return surprisal_V


def _compression(text: str) -> float:
    raw = text.encode("utf-8")
    return len(zlib.compress(raw, 6)) / len(raw) if raw else 0.0


def _text(tokenizer: TextTokenizer, tokens: Tokens) -> str:
    return tokenizer.decode(tokens[1:].tolist())


def _imported(name: str, code_dir: Path) -> Callable[[str], float]:
    module, _, attribute = name.partition(":")
    try:
        function: Callable[[str], float] = getattr(imported(module, code_dir), attribute)
    except Exception as error:  # importing user code may raise anything
        raise DataError(
            f"curriculum.signal {name} can't be imported: {error}",
            remedy="Name a function of a module in the current directory, or in curriculum.code_dir.",
            unchanged="Nothing was written.",
        ) from error
    return function


def _without_score(name: str, document_id: str, what: str) -> DataError:
    return DataError(
        f"curriculum.signal {name} {what} for the document {document_id}",
        remedy="Have it return a finite number for every text.",
        unchanged="No store was written.",
    )
