"""Weights of sources: the share of each in the training split's tokens, achieved by leaving documents out.

The source with the fewest tokens for its weight is taken whole, once. Of every other one, documents are taken in the
order of a hash of their ids, up to the tokens of its share: so shares are exact to one document, and a growing source
keeps most of the documents that were taken before. Nothing is repeated.
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
    """Mask of the documents to leave out, of D training documents.

    Args:
        weights: weights of the sources, above 0; only their ratios matter.
        source_D, tokens_D, ranks_D: each document's source, its tokens and the hash of its id, in [0, 1).
    """
    left_out_D = np.zeros(len(source_D), np.bool_)
    held = np.array([int(tokens_D[source_D == source].sum()) for source in range(len(weights))])
    unit = min((tokens / weight for tokens, weight in zip(held, weights, strict=True) if tokens), default=0.0)
    for source, weight in enumerate(weights):
        if held[source] <= unit * weight * (1 + 1e-9):  # the scarcest source itself, regardless of rounding
            continue
        mine = np.flatnonzero(source_D == source)
        by_rank = mine[np.argsort(ranks_D[mine], kind="stable")]
        left_out_D[by_rank[np.cumsum(tokens_D[by_rank]) > max(unit * weight, tokens_D[by_rank[0]])]] = True
    return left_out_D
