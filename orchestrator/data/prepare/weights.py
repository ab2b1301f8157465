"""Weights of sources: the share of each in the training split's tokens, got by leaving documents out.

The source that has the fewest tokens for its weight is taken whole, once. Of every other one, documents are taken in
the order of a hash of their ids, up to the tokens that its share allows: so a share holds to a document, and a source
that grows keeps most of the documents that it gave before. Nothing is repeated.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def surplus(
    weights: Sequence[float],
    source_D: NDArray[np.integer],
    tokens_D: NDArray[np.int64],
    ranks_D: NDArray[np.float64],
) -> NDArray[np.bool_]:
    """Which documents are left out, of D training documents.

    Args:
        weights: of the sources, above 0; only their ratios count.
        source_D, tokens_D, ranks_D: each document's source, its tokens and the hash of its id, in [0, 1).
    """
    left_out_D = np.zeros(len(source_D), np.bool_)
    held = np.array([int(tokens_D[source_D == source].sum()) for source in range(len(weights))])
    unit = min((tokens / weight for tokens, weight in zip(held, weights, strict=True) if tokens), default=0.0)
    for source, weight in enumerate(weights):
        if held[source] <= unit * weight * (1 + 1e-9):  # the scarcest one itself, whatever the division rounds to
            continue
        mine = np.flatnonzero(source_D == source)
        by_rank = mine[np.argsort(ranks_D[mine], kind="stable")]
        left_out_D[by_rank[np.cumsum(tokens_D[by_rank]) > max(unit * weight, tokens_D[by_rank[0]])]] = True
    return left_out_D
