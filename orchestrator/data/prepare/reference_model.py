"""The small language model whose loss says how difficult a document is: bigrams, interpolated with unigrams.

Suffixes: V vocabulary, C cells, T pairs of neighbours in a document.

Counts are whole numbers, and those of parts add up: the model is the same to the last bit, whatever the order and
whoever read which document.
"""

import numpy as np
from numpy.typing import NDArray

CELL_BITS = 22
# Pairs that the unigram's share is worth. Of 1, 5, 20, 50, 100, 200, 500 and 2,000 it gave the lowest loss on held-out
# files of Python's library, with 2,048, 8,192 and 32,768 tokens alike; 20 and 500 order documents almost the same.
PRIOR = 100
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, an odd number

Tokens = NDArray[np.integer]
Counts = NDArray[np.int64]


class PairCounts:
    """How often one token follows another within documents, in 32 MiB however many there are: `add` each.

    Attributes:
        pairs_C: how often pairs occur, by the cell of the pair. 8 bytes each: 4 would run over in large corpora.
        firsts_V, seconds_V: how many pairs a token is the first of, and the second.
        num_pairs: of all documents.
    """

    def __init__(self, vocab_size: int) -> None:
        self.pairs_C: Counts = np.zeros(1 << CELL_BITS, np.int64)
        self.firsts_V: Counts = np.zeros(vocab_size, np.int64)
        self.seconds_V: Counts = np.zeros(vocab_size, np.int64)
        self.num_pairs = 0

    def add(self, tokens: Tokens) -> None:
        """A whole document: its last token and the first of the next one are no pair."""
        np.add.at(self.pairs_C, self.cells_of(tokens), 1)
        np.add.at(self.firsts_V, tokens[:-1], 1)
        np.add.at(self.seconds_V, tokens[1:], 1)
        self.num_pairs += max(0, len(tokens) - 1)

    def cells_of(self, tokens: Tokens) -> NDArray[np.uint64]:
        """The cell of each pair (T): its own if there are enough, which is up to 2,048 tokens; else by multiplicative
        hashing (Knuth, "The Art of Computer Programming", volume 3, section 6.4)."""
        vocab_size = len(self.firsts_V)
        pairs_T = tokens[:-1].astype(np.uint64) * np.uint64(vocab_size) + tokens[1:].astype(np.uint64)
        return pairs_T if vocab_size**2 <= 1 << CELL_BITS else pairs_T * GOLDEN >> np.uint64(64 - CELL_BITS)


def reference_loss(counts: PairCounts, tokens: Tokens, was_added: bool) -> float:
    """Mean -log p of a document's tokens, each given the one before it, in nats; 0.0 for one of nothing but its border.

        p(b | a) = (c(a, b) + PRIOR p(b)) / (c(a) + PRIOR)    p(b) = (c(b) + 1) / (c + V)

    Jelinek-Mercer interpolation, the bigram's weight c(a) / (c(a) + PRIOR) growing with how often its context was seen
    (Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling", 1998, section 2.3), as a
    Dirichlet prior gives it (MacKay and Peto, "A Hierarchical Dirichlet Language Model", 1995). Witten-Bell has the
    number of different tokens after `a` for PRIOR, which cells that pairs share can't tell.

    Args:
        was_added: the document is one of those counted. Its own counts are then left out: a rare text must not be easy
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
    # A pair isn't more frequent than its tokens. Its cell may say so, if others share it: p would be above 1.
    pair_T = np.minimum(pair_T, np.minimum(first_T, second_T))
    unigram_T = (second_T + 1) / (num_pairs + len(counts.seconds_V))
    return float(-np.log((pair_T + PRIOR * unigram_T) / (first_T + PRIOR)).mean())


def _repeats(values_T: NDArray[np.integer]) -> Counts:
    """How often each value occurs among all of them."""
    _, place_T, counts = np.unique(values_T, return_inverse=True, return_counts=True)
    repeats_T: Counts = counts[place_T]
    return repeats_T
