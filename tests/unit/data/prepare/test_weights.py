import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.prepare.weights import surplus

Documents = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 50), st.floats(0, 1, exclude_max=True)), max_size=60)


def arrays(documents: list[tuple[int, int, float]]) -> "tuple[np.ndarray, np.ndarray, np.ndarray]":
    source_D = np.array([source for source, _, _ in documents], np.int64)
    tokens_D = np.array([tokens for _, tokens, _ in documents], np.int64)
    return source_D, tokens_D, np.array([rank for _, _, rank in documents], np.float64)


@given(Documents, st.lists(st.floats(0.1, 10), min_size=3, max_size=3))
def test_shares_hold_to_a_document_and_the_scarcest_is_whole(
    documents: list[tuple[int, int, float]], weights: list[float]
) -> None:
    source_D, tokens_D, ranks_D = arrays(documents)
    left_out_D = surplus(weights, source_D, tokens_D, ranks_D)
    kept = [int(tokens_D[(source_D == source) & ~left_out_D].sum()) for source in range(3)]
    held = [int(tokens_D[source_D == source].sum()) for source in range(3)]
    unit = min((tokens / weight for tokens, weight in zip(held, weights, strict=True) if tokens), default=0.0)
    for source in range(3):
        mine = source_D == source
        if not held[source]:
            continue
        budget = unit * weights[source]
        longest = int(tokens_D[mine].max())
        assert kept[source] > 0
        assert kept[source] <= max(budget * (1 + 1e-9), longest)
        assert kept[source] > budget - longest - 1 or kept[source] == held[source]
    assert not left_out_D.any() or any(k == h for k, h in zip(kept, held, strict=True) if h)


@given(Documents)
def test_documents_are_left_out_by_rank(documents: list[tuple[int, int, float]]) -> None:
    source_D, tokens_D, ranks_D = arrays(documents)
    left_out_D = surplus([5.0, 1.0, 1.0], source_D, tokens_D, ranks_D)
    for source in range(3):
        kept, out = (ranks_D[(source_D == source) & flag] for flag in (~left_out_D, left_out_D))
        assert not len(out) or not len(kept) or kept.max() <= out.min()


def test_only_the_ratio_of_weights_counts() -> None:
    rng = np.random.default_rng(0)
    source_D, tokens_D, ranks_D = rng.integers(0, 3, 500), rng.integers(1, 100, 500), rng.random(500)
    first, second = (surplus(weights, source_D, tokens_D, ranks_D) for weights in ([0.2, 0.3, 0.5], [2.0, 3.0, 5.0]))
    assert (first == second).all() and first.any()
