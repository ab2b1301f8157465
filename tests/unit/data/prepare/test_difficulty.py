"""Signals of difficulty, by hand and against plain loops, and how they come into a store."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.prepare.difficulty import WINDOW, PairCounts, Signal, diversity, signal_of
from orchestrator.data.prepare.job_store import prepare
from orchestrator.errors import DataError
from orchestrator.spec.curriculum import SIGNALS
from orchestrator.user_code import imported
from tests.unit.data.stores import BYTES_ONLY

COUNTS_V = np.bincount([5] * 90 + [7] * 9, minlength=BYTES_ONLY.vocab_size)


def _signal(name: str) -> Signal:
    return signal_of(name, BYTES_ONLY, lambda: COUNTS_V, lambda: PairCounts(BYTES_ONLY.vocab_size), False)


def _tokens(text: str) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    return np.array(BYTES_ONLY.encode([text])[0])


@given(st.lists(st.integers(0, 9), min_size=1, max_size=130))
def test_diversity_is_the_mean_over_all_windows(tokens: list[int]) -> None:
    window = min(WINDOW, len(tokens))
    shares = [len(set(tokens[i : i + window])) / window for i in range(len(tokens) - window + 1)]
    assert diversity(np.array([256, *tokens])) == pytest.approx(np.mean(shares))


def test_a_document_of_nothing_but_its_border_has_every_score() -> None:
    for name in SIGNALS:
        assert np.isfinite(_signal(name)(_tokens("")))


def test_rare_tokens_count_more_than_frequent_ones() -> None:
    rarity = _signal("rarity")
    frequent, rare, never = (rarity(np.array([256, t, t])) for t in (5, 7, 9))
    assert frequent < rare < never
    total = 99 + len(COUNTS_V)
    assert frequent == pytest.approx(-np.log(91 / total)) and never == pytest.approx(np.log(total))


def test_repetition_is_easy() -> None:
    compression = _signal("compression")
    assert compression(_tokens("abab" * 200)) < 0.1 < compression(_tokens("the quick brown fox jumps over it"))


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.chdir(tmp_path)
    Path("my_scores.py").touch()
    return imported("my_scores", tmp_path)


def _texts(directory: Path) -> str:
    for number in range(8):
        (directory / f"{number}.txt").write_text("x" * (number + 1))
    return str(directory)


def test_a_function_of_the_users_own_scores_every_document(tmp_path: Path, module: ModuleType) -> None:
    module.score = lambda text: -len(text)
    (tmp_path / "texts").mkdir()
    store = prepare(_texts(tmp_path / "texts"), 257, 0.3, tmp_path / "stores", difficulty="my_scores:score")
    for split in ("train", "validation"):
        index_D = store.index(split)
        assert len(index_D) and (index_D["score"] == 1 - index_D["length"]).all()


@pytest.mark.parametrize(
    ("score", "what"),
    [
        (lambda text: 1 / (len(text) - 3), "raised ZeroDivisionError: division by zero for the document 2.txt"),
        (lambda text: float("nan"), "gave nan for the document"),
        (lambda text: None, "raised TypeError"),
    ],
)
def test_a_function_without_an_answer_is_named_with_its_document(
    tmp_path: Path, module: ModuleType, score: object, what: str
) -> None:
    module.score = score
    (tmp_path / "texts").mkdir()
    with pytest.raises(DataError, match=f"curriculum.signal my_scores:score {what}"):
        prepare(_texts(tmp_path / "texts"), 257, 0.3, tmp_path / "stores", difficulty="my_scores:score")
    assert not list((tmp_path / "stores").glob("store-*"))


@pytest.mark.parametrize("name", ["my_scores:none", "no_such_module:score"])
def test_a_missing_function_is_refused(tmp_path: Path, module: ModuleType, name: str) -> None:
    (tmp_path / "texts").mkdir()
    with pytest.raises(DataError, match="can't be imported"):
        prepare(_texts(tmp_path / "texts"), 257, 0.3, tmp_path / "stores", difficulty=name)


def test_another_signal_is_another_store(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    source = _texts(tmp_path / "texts")
    plain, scored = (prepare(source, 257, 0.3, tmp_path / "s", difficulty=d) for d in (None, "length"))
    assert plain.directory != scored.directory and np.isnan(plain.index("train")["score"]).all()
    assert (scored.index("train")["score"] == scored.index("train")["length"]).all()
