"""The loss under the reference model: by hand, against plain loops, and as it comes into a store."""

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.prepare import difficulty
from orchestrator.data.prepare.difficulty import PRIOR, PairCounts, reference_loss
from orchestrator.data.prepare.job_store import prepare

VOCAB_SIZE = 10
BORDER = 9  # a document's first token
SHARED = 1 << 16  # a vocabulary whose pairs share cells
Documents = list[list[int]]

documents = st.lists(st.lists(st.integers(0, 4), max_size=12).map(lambda tokens: [BORDER, *tokens]), max_size=6)


def counted(documents: Sequence[Sequence[int]], vocab_size: int = VOCAB_SIZE) -> PairCounts:
    counts = PairCounts(vocab_size)
    for tokens in documents:
        counts.add(np.array(tokens, np.int64))
    return counts


def loss(counts: PairCounts, tokens: Sequence[int], was_added: bool) -> float:
    return reference_loss(counts, np.array(tokens, np.uint16), was_added)


def test_values_by_hand() -> None:
    first, second = [BORDER, 0, 1], [BORDER, 0, 0]
    counts = counted([first, second])
    by_all = [(2 + PRIOR * 4 / 14) / (2 + PRIOR), (1 + PRIOR * 2 / 14) / (2 + PRIOR)]
    assert loss(counts, first, was_added=False) == pytest.approx(-np.log(by_all).mean())
    by_second = [(1 + PRIOR * 3 / 12) / (1 + PRIOR), (0 + PRIOR * 1 / 12) / (1 + PRIOR)]
    assert loss(counts, first, was_added=True) == pytest.approx(-np.log(by_second).mean())


def test_a_document_alone_is_as_hard_as_chance() -> None:
    """Its contexts and tokens occur nowhere else."""
    tokens = [BORDER, 1, 2, 1, 2, 2]
    assert loss(counted([tokens]), tokens, was_added=True) == pytest.approx(np.log(VOCAB_SIZE))


@pytest.mark.parametrize("tokens", [[], [BORDER]], ids=["empty", "border"])
@pytest.mark.parametrize("was_added", [False, True])
def test_a_document_without_text_has_no_loss(tokens: list[int], was_added: bool) -> None:
    counts = counted([[BORDER, 1, 2], tokens])
    assert loss(counts, tokens, was_added) == 0.0
    assert counts.num_pairs == 2


@given(documents, st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_the_loss_is_that_of_a_plain_loop(documents: Documents, text: list[int]) -> None:
    tokens = [BORDER, *text]
    pairs = Counter(pair for document in documents for pair in pairwise(document))
    firsts, seconds = Counter[int](), Counter[int]()
    for (first, second), count in pairs.items():
        firsts[first] += count
        seconds[second] += count
    nats = 0.0
    for first, second in pairwise(tokens):
        unigram = (seconds[second] + 1) / (pairs.total() + VOCAB_SIZE)
        nats -= np.log((pairs[first, second] + PRIOR * unigram) / (firsts[first] + PRIOR))
    assert loss(counted(documents), tokens, was_added=False) == pytest.approx(nats / len(text))


@given(documents, documents, st.lists(st.integers(0, 4), min_size=1, max_size=12), st.booleans())
def test_a_training_document_is_scored_by_the_others(
    before: Documents, after: Documents, text: list[int], shared: bool
) -> None:
    """To the last bit, and whether pairs share cells or not."""
    tokens, vocab_size = [BORDER, *text], SHARED if shared else VOCAB_SIZE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(difficulty, "CELL_BITS", 3 if shared else 22)
        found = loss(counted([*before, tokens, *after], vocab_size), tokens, was_added=True)
        assert found == loss(counted(before + after, vocab_size), tokens, was_added=False)
    assert found >= 0


@given(documents, st.randoms(use_true_random=False), st.integers(0, 6), st.sampled_from([VOCAB_SIZE, SHARED]))
def test_counts_of_parts_add_up(documents: Documents, chance: object, cut: int, vocab_size: int) -> None:
    whole = counted(documents, vocab_size)
    mixed = chance.sample(documents, len(documents))  # type: ignore[attr-defined]
    parts = [counted(part, vocab_size) for part in (mixed[:cut], mixed[cut:])]
    for name in ("pairs_C", "firsts_V", "seconds_V", "num_pairs"):
        assert np.array_equal(sum(getattr(part, name) for part in parts), getattr(whole, name))


def test_pairs_share_cells_only_if_there_are_too_many() -> None:
    every = np.arange(2048, dtype=np.uint16)
    counts = PairCounts(2048)
    cells = np.concatenate([counts.cells_of(np.stack([every, np.roll(every, n)], 1).ravel())[::2] for n in range(9)])
    assert len(np.unique(cells)) == len(cells) and cells.max() < len(counts.pairs_C)
    crowded = PairCounts(1 << 17).cells_of(np.random.default_rng(0).integers(0, 1 << 17, 200_000, np.uint32))
    assert crowded.max() < len(counts.pairs_C)
    assert len(np.unique(crowded)) > 0.95 * len(crowded)  # spread as by chance: 0.977


def test_repetitive_text_is_easier_than_noise() -> None:
    noise, other = (
        [BORDER, *chance.integers(0, BORDER, 400).tolist()] for chance in map(np.random.default_rng, (0, 1))
    )
    prose = [BORDER, *[1, 2, 3, 4] * 100]
    counts = counted([prose, prose, noise, other])
    for was_added in (False, True):
        assert loss(counts, prose, was_added) < 0.7 * loss(counts, noise, was_added)


def test_a_store_scores_training_documents_by_the_others_and_validation_by_all(tmp_path: Path) -> None:
    texts = [f"Chapter {n} of {n * n}: the café has {n * 77 % 13} tables.\n" * (1 + n % 3) for n in range(12)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    store = prepare(str(tmp_path / "a.jsonl"), 300, 0.3, tmp_path / "stores", difficulty="reference_loss")
    tokens = {
        split: [
            np.fromfile(store.directory / f"{split}.tokens", store.manifest.token_dtype)[offset : offset + length]
            for _, offset, length, _ in store.index(split).tolist()
        ]
        for split in ("train", "validation")
    }
    train = tokens["train"]
    for number, score in enumerate(store.index("train")["score"]):
        others = counted([*train[:number], *train[number + 1 :]], store.manifest.vocab_size)
        assert score == np.float32(reference_loss(others, train[number], was_added=False))
    everything = counted(train, store.manifest.vocab_size)
    for each, score in zip(tokens["validation"], store.index("validation")["score"], strict=True):
        assert score == np.float32(reference_loss(everything, each, was_added=False))
