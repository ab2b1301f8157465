import json
import multiprocessing
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.holdout import Holdout
from orchestrator.data.manifest import PrepareOptions, store_key
from orchestrator.data.prepare import pipeline, request
from orchestrator.data.prepare.job_store import check_enough, check_vocabulary, prepare
from orchestrator.data.store import TokenStore
from orchestrator.errors import DataError, StoreCorrupt
from tests.unit.data.stores import write_store


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Twenty documents of different lengths."""
    directory = tmp_path / "texts"
    directory.mkdir()
    for number in range(20):
        line = f"Chapter {number} tells of the {number}th day, and how the naïve café owner met it.\n"
        (directory / f"{number:02}.txt").write_text(line * (5 + number), encoding="utf-8")
    return directory


def text_of(store: TokenStore, split: str) -> list[str]:
    tokens = np.fromfile(store.directory / f"{split}.tokens", store.manifest.token_dtype)
    tokenizer = store.tokenizer()
    return [
        tokenizer.decode(tokens[offset : offset + length].tolist())
        for offset, length in zip(store.index(split)["offset"], store.index(split)["length"], strict=True)
    ]


def test_every_document_is_in_one_split_whole(texts: Path, tmp_path: Path) -> None:
    store = prepare(str(texts), 300, 0.3, tmp_path / "stores")
    names = sorted(path.name for path in texts.iterdir())
    found: dict[str, str] = {}
    for split in ("train", "validation"):
        numbers = store.index(split)["document"].tolist()
        assert numbers
        found |= {names[number]: text for number, text in zip(numbers, text_of(store, split), strict=True)}
    assert found == {path.name: path.read_text(encoding="utf-8") for path in texts.iterdir()}
    assert store.vocab_size == 300
    assert sum(counts.num_documents for counts in store.manifest.splits.values()) == 20


def test_the_same_question_finds_the_same_store(texts: Path, tmp_path: Path) -> None:
    first = prepare(str(texts), 300, 0.3, tmp_path / "stores")
    written = {path: path.stat().st_mtime_ns for path in first.directory.iterdir()}
    again = prepare(str(texts), 300, 0.3, tmp_path / "stores")
    assert again.digest == first.digest
    assert {path: path.stat().st_mtime_ns for path in again.directory.iterdir()} == written
    assert prepare(str(texts), 300, 0.3, tmp_path / "elsewhere").digest == first.digest


def test_another_corpus_or_option_makes_another_store(texts: Path, tmp_path: Path) -> None:
    directories = {prepare(str(texts), 300, 0.3, tmp_path / "stores").directory}
    directories.add(prepare(str(texts), 301, 0.3, tmp_path / "stores").directory)
    directories.add(prepare(str(texts), 300, 0.2, tmp_path / "stores").directory)
    (texts / "00.txt").write_text("changed")
    directories.add(prepare(str(texts), 300, 0.3, tmp_path / "stores").directory)
    assert len(directories) == 4
    assert set((tmp_path / "stores").iterdir()) == directories


def test_a_corrupt_store_is_reported_and_not_overwritten(texts: Path, tmp_path: Path) -> None:
    store = prepare(str(texts), 300, 0.3, tmp_path / "stores")
    path = store.directory / "train.tokens"
    damaged = path.read_bytes()[:-2] + b"\0\0"
    path.write_bytes(damaged)
    with pytest.raises(StoreCorrupt, match=r"train\.tokens"):
        prepare(str(texts), 300, 0.3, tmp_path / "stores")
    assert path.read_bytes() == damaged


def test_a_failure_under_way_leaves_no_store(texts: Path, tmp_path: Path) -> None:
    def interrupt(stage: str, fraction: float) -> None:
        if stage == "encoding":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(str(texts), 300, 0.3, tmp_path / "stores", interrupt)
    assert all(path.name.startswith(".") for path in (tmp_path / "stores").iterdir())


def test_a_corpus_that_changes_during_training_of_the_tokenizer_is_noticed(texts: Path, tmp_path: Path) -> None:
    def change_the_corpus(stage: str, fraction: float) -> None:
        if stage == "tokenizer":
            (texts / "19.txt").write_text("changed")

    with pytest.raises(DataError, match="changed while it was read"):
        prepare(str(texts), 300, 0.3, tmp_path / "stores", change_the_corpus)
    assert not list((tmp_path / "stores").glob("store-*"))


def _prepare_and_die(texts: str, stores: str) -> None:
    prepare(texts, 300, 0.3, stores, lambda stage, fraction: os._exit(9) if stage == "encoding" else None)


def test_what_a_killed_process_leaves_is_never_picked_up(texts: Path, tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(
        target=_prepare_and_die, args=(str(texts), str(tmp_path / "stores"))
    )
    process.start()
    process.join()
    assert process.exitcode == 9
    [parts] = (tmp_path / "stores").iterdir()
    assert parts.name.endswith(".parts")
    store = prepare(str(texts), 300, 0.3, tmp_path / "stores")
    assert [store.directory] == list((tmp_path / "stores").iterdir())
    TokenStore.open(store.directory, verify=True)


def test_of_two_that_prepare_at_once_both_get_the_store(texts: Path, tmp_path: Path) -> None:
    """The second waits for the first."""
    with ThreadPoolExecutor(1) as pool:
        others: list[Future[TokenStore]] = []

        def overtake(stage: str, fraction: float) -> None:
            if stage == "encoding" and not others:
                others.append(pool.submit(prepare, str(texts), 300, 0.3, tmp_path / "stores"))

        first = prepare(str(texts), 300, 0.3, tmp_path / "stores", overtake)
        assert first.digest == others[0].result().digest
    assert list((tmp_path / "stores").iterdir()) == [first.directory]


def test_progress_rises_through_the_stages(texts: Path, tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []
    prepare(str(texts), 300, 0.3, tmp_path / "stores", lambda stage, fraction: told.append((stage, fraction)))
    order = ["reading", "tokenizer", "encoding", "writing", "done"]
    ranks = [(order.index(stage), fraction) for stage, fraction in told]
    assert ranks == sorted(ranks)
    assert {stage for stage, _ in told} == set(order)
    assert all(0 <= fraction <= 1 for _, fraction in told)


def test_the_tokenizer_sees_training_documents_only(texts: Path, tmp_path: Path) -> None:
    held_out = dict(zip(sorted(path.name for path in texts.iterdir()), _splits_of_texts(texts), strict=True))
    for name, split in held_out.items():
        if split == "validation":
            (texts / name).write_text("zqzqzqzq " * 1000)
    [tokens] = prepare(str(texts), 400, 0.3, tmp_path / "stores").tokenizer().encode(["zqzqzqzq"])
    assert len(tokens) == 9  # the document token, and one a byte


def split_documents(names: list[str], holdout: float) -> tuple[str, ...]:
    splits = Holdout(holdout)
    for name in names:
        splits.add(name)
    return tuple("validation" if held_out else "train" for held_out in splits.finished())


def _splits_of_texts(texts: Path) -> tuple[str, ...]:
    return split_documents(sorted(path.name for path in texts.iterdir()), 0.3)


def test_the_tokenizer_learns_from_a_share_of_every_document(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    train = pipeline.TextTokenizer.train

    def listen(texts: list[str], vocab_size: int) -> pipeline.TextTokenizer:
        seen.extend(texts)
        return train(seen, vocab_size)

    monkeypatch.setattr(request, "TOKENIZER_TRAIN_BYTES", 5000)
    monkeypatch.setattr(pipeline.TextTokenizer, "train", listen)
    prepare(str(texts), 300, 0.3, tmp_path / "stores")
    assert len(seen) == _splits_of_texts(texts).count("train")
    assert all(seen)
    assert 2500 < sum(len(text) for text in seen) <= 5000


@given(
    names=st.lists(st.text(st.characters(codec="utf-8")), min_size=2, max_size=40, unique=True),
    holdout=st.floats(0, 1, exclude_max=True),
)
def test_both_splits_have_documents_at_any_holdout(names: list[str], holdout: float) -> None:
    assert set(split_documents(names, holdout)) == {"train", "validation"}


def test_the_held_out_fraction_is_kept_and_a_growing_corpus_moves_no_document() -> None:
    names = [f"document {number}" for number in range(4000)]
    splits = split_documents(names, 0.1)
    assert 300 < splits.count("validation") < 500
    assert split_documents(names[::2], 0.1) == splits[::2]


def test_a_corpus_of_one_document_cannot_be_split(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("only one paragraph")
    with pytest.raises(DataError, match="has 1 document; it needs at least 2"):
        prepare(str(tmp_path / "one.txt"), 300, 0.1, tmp_path / "stores")
    assert list((tmp_path / "stores").iterdir()) == []


@pytest.mark.parametrize("holdout", [-0.1, 1.0, float("nan")])
def test_a_holdout_out_of_range_is_refused(texts: Path, tmp_path: Path, holdout: float) -> None:
    with pytest.raises(DataError, match=r"data\.holdout is"):
        prepare(str(texts), 300, holdout, tmp_path / "stores")


def test_a_directory_that_cannot_be_made_is_named(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="can't be written to .*file/stores"):
        prepare(str(texts), 300, 0.3, tmp_path / "file/stores")


def test_enough_is_enough_and_less_is_refused(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [41], [9])  # 10 and 2 rows of 4 tokens
    check_enough(store, 4, 10, min_validation_rows=2)
    with pytest.raises(DataError, match="41 tokens: 10 rows of 4 tokens, and one global batch needs 11") as raised:
        check_enough(store, 4, 11)
    assert "data.source" in raised.value.remedy
    with pytest.raises(DataError, match="9 tokens: 2 rows of 4 tokens, and validation needs 3"):
        check_enough(store, 4, 10, min_validation_rows=3)


def test_the_key_depends_on_every_option() -> None:
    options = PrepareOptions(vocab_size=300, holdout=0.1, tokenizer_train_bytes=10)
    others = [
        {"vocab_size": 301},
        {"holdout": 0.2},
        {"tokenizer_train_bytes": 11},
    ]
    keys = {store_key("a", options), store_key("b", options)}
    keys |= {store_key("a", options.model_copy(update=other)) for other in others}
    assert len(keys) == 5
    assert store_key("a", options) in keys


def test_a_given_tokenizer_is_used_and_names_the_store(texts: Path, tmp_path: Path) -> None:
    learned = prepare(str(texts), 300, 0.3, tmp_path / "stores")
    saved = learned.tokenizer().to_bytes().replace(b"<|document|>", b"<|endoftext|>")
    (tmp_path / "tokenizer.json").write_bytes(saved)
    directories = set()
    for border in ("<|endoftext|>", "e"):
        (tmp_path / "config.json").write_text(json.dumps({"bos_token": border}))
        store = prepare(str(texts), 2048, 0.3, tmp_path / "stores", tokenizer=tmp_path / "tokenizer.json")
        assert store.tokenizer().to_bytes() == saved and store.vocab_size == learned.vocab_size
        starts = store.rows("train", np.array([0]), 8).inputs_RT[0, 0]
        assert starts == store.tokenizer().document_token == store.tokenizer()._tokenizer.token_to_id(border)
        directories.add(store.directory)
    assert len(directories | {learned.directory}) == 3


def test_an_invalid_tokenizer_is_named(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can't be read: No such file"):
        prepare(str(texts), 300, 0.3, tmp_path, tokenizer=tmp_path / "none.json")
    (tmp_path / "some.json").write_text("{}")
    with pytest.raises(DataError, match=r"some\.json: this is no tokenizer\.json"):
        prepare(str(texts), 300, 0.3, tmp_path, tokenizer=tmp_path / "some.json")


def test_a_model_has_a_row_for_each_token() -> None:
    check_vocabulary(None, 300)
    check_vocabulary(320, 300)
    with pytest.raises(DataError, match="has 300 tokens, the model has rows for 299"):
        check_vocabulary(299, 300)
