"""Preparation of corpora of any size, without a cluster: `map` runs the tasks, or a function that runs them in another
order."""

import gzip
import hashlib
import json
import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from orchestrator.data.manifest import DOCUMENTS, TOKENIZER, StoreManifest
from orchestrator.data.prepare import scan as scan_module
from orchestrator.data.prepare.job_store import prepare
from orchestrator.data.prepare.pipeline import prepare_corpora
from orchestrator.data.prepare.request import Request
from orchestrator.data.store import TokenStore
from orchestrator.errors import DataError, StoreCorrupt
from orchestrator.user_code import imported

PLAIN = Request(("",), vocab_size=300, holdout=0.3, deduplicate=False)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of little text."""
    monkeypatch.setattr(scan_module, "SMALLEST_BLOCK", 2000)


def texts(count: int, first: int = 0) -> list[str]:
    return [f"Chapter {n} tells of the {n}th day, and how the naïve café owner met it.\n" * (1 + n % 9)
            for n in range(first, first + count)]  # fmt: skip


def write_folder(folder: Path) -> Path:
    for number, text in enumerate(texts(40)):
        (folder / f"{number:02}.txt").write_text(text)
    (folder / "blank.txt").write_text("\n")
    return folder


def write_lines(path: Path, rows: Iterable[str]) -> Path:
    content = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in rows)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_parquet(folder: Path) -> Path:
    parquet.write_table(pyarrow.table({"text": texts(60)}), folder / "a.parquet", row_group_size=16)
    return folder / "a.parquet"


def write_arrow(folder: Path) -> Path:
    table = pyarrow.table({"text": texts(60)})
    with pyarrow.OSFile(str(folder / "a.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=10)
    return folder / "a.arrow"


def write_book(folder: Path) -> Path:
    (folder / "book.txt").write_text("".join(text + "\n" for text in texts(400)))
    return folder / "book.txt"


CORPORA: dict[str, Callable[[Path], Path]] = {
    "folder": write_folder,
    "jsonl": lambda folder: write_lines(folder / "a.jsonl", [*texts(60), "", " "]),
    "jsonl.gz": lambda folder: write_lines(folder / "a.jsonl.gz", texts(60)),
    "parquet": write_parquet,
    "arrow": write_arrow,
    "book": write_book,
    "mixed": lambda folder: write_parquet(write_lines(write_folder(folder) / "z.jsonl.gz", texts(9, 50)).parent).parent,
}


def contents(store: TokenStore) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.directory.iterdir()}


def shuffled(function: Callable[[str], str], tasks: Sequence[str]) -> list[str]:
    """As a cluster does it: in any order."""
    return [function(task) for task in random.Random(len(tasks)).sample(tasks, len(tasks))]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    return folder


def ids_of(store: TokenStore) -> list[str]:
    return [json.loads(line) for line in (store.directory / DOCUMENTS).read_text().splitlines()]


def texts_of(store: TokenStore) -> dict[str, str]:
    """Every document's text by its id, from the tokens."""
    ids, tokenizer, found = ids_of(store), store.tokenizer(), {}
    for split in ("train", "validation"):
        tokens = np.fromfile(store.directory / f"{split}.tokens", store.manifest.token_dtype)
        for number, offset, length, _ in store.index(split).tolist():
            found[ids[number]] = tokenizer.decode(tokens[offset : offset + length].tolist())
    return found


@pytest.mark.parametrize("name", CORPORA)
@pytest.mark.parametrize("difficulty", [None, "rarity", "compression", "reference_loss"])
def test_the_store_is_that_of_prepare_to_the_last_byte(
    corpus: Path, tmp_path: Path, name: str, difficulty: str | None
) -> None:
    source = str(CORPORA[name](corpus))
    told: list[tuple[str, float]] = []
    done = prepare_corpora(
        replace(PLAIN, sources=(source,), difficulty=difficulty),
        tmp_path / "bulk",
        shuffled,
        lambda stage, fraction: told.append((stage, fraction)),
    )
    alone = prepare(source, 300, 0.3, tmp_path / "alone", difficulty=difficulty)
    assert done.num_blocks > 2 and not done.found
    assert done.store.directory.name == alone.directory.name
    assert contents(done.store) == contents(alone)
    order = ["reading", "tokenizer", "encoding", "writing", "done"]
    ranks = [(order.index(stage), fraction) for stage, fraction in told]
    assert ranks == sorted(ranks) and all(0 <= fraction <= 1 for _, fraction in told)
    assert {path.name for path in (tmp_path / "bulk").iterdir()} - {done.store.directory.name} <= {
        f"{done.store.directory.name}.quarantine.jsonl"
    }


def test_a_large_corpus_gives_the_tokenizer_the_same_share(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.data.prepare.request.TOKENIZER_TRAIN_BYTES", 3000)
    source = str(write_folder(corpus))
    done = prepare_corpora(replace(PLAIN, sources=(source,)), tmp_path / "bulk", shuffled)
    assert contents(done.store) == contents(prepare(source, 300, 0.3, tmp_path / "alone"))


def test_a_given_tokenizer_is_used(corpus: Path, tmp_path: Path) -> None:
    source = str(write_folder(corpus))
    learned = prepare(source, 300, 0.3, tmp_path / "learned")
    given = tmp_path / "tokenizer.json"
    given.write_bytes(learned.tokenizer().to_bytes().replace(b"<|document|>", b"<|endoftext|>"))
    (tmp_path / "config.json").write_text('{"eos_token": "<|endoftext|>"}')
    done = prepare_corpora(replace(PLAIN, sources=(source,), tokenizer=given), tmp_path / "bulk", map)
    assert contents(done.store) == contents(prepare(source, 300, 0.3, tmp_path / "alone", tokenizer=given))


@settings(max_examples=25)
@given(
    rows=st.lists(st.sampled_from(["alpha", "beta", "gamma ray", "delta " * 9, "", "epsilon " * 30]), min_size=4),
    low=st.sampled_from([None, 1, 6]),
    high=st.sampled_from([None, 60]),
    deduplicate=st.booleans(),
)
def test_what_is_kept_is_what_a_plain_loop_keeps(
    tmp_path_factory: pytest.TempPathFactory, rows: list[str], low: int | None, high: int | None, deduplicate: bool
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    path = write_lines(folder / "a.jsonl", rows)
    kept: dict[str, str] = {}
    counts = {"shorter": 0, "longer": 0, "duplicates": 0}
    for number, text in enumerate(rows):
        if not text.strip():
            continue
        if len(text) < (low or 0):
            counts["shorter"] += 1
        elif high is not None and len(text) > high:
            counts["longer"] += 1
        elif deduplicate and text in kept.values():
            counts["duplicates"] += 1
        else:
            kept[f"a.jsonl#{number}"] = text
    request = replace(PLAIN, sources=(str(path),), min_chars=low, max_chars=high, deduplicate=deduplicate)
    if len(kept) < 2:
        with pytest.raises(DataError, match="is empty|it needs at least 2"):
            prepare_corpora(request, folder / "stores", shuffled)
        return
    store = prepare_corpora(request, folder / "stores", shuffled).store
    assert texts_of(store) == kept
    [source] = store.manifest.sources
    dropped = {} if source.dropped is None else source.dropped.model_dump()
    assert {reason: dropped.get(reason, 0) for reason in counts} == counts
    assert (source.num_documents, source.num_bytes) == (len(kept), sum(len(text.encode()) for text in kept.values()))


def test_of_equal_texts_the_first_is_kept_across_sources(corpus: Path, tmp_path: Path) -> None:
    first = write_lines(corpus / "first.jsonl", ["a", "b", "a"])
    second = write_lines(corpus / "second.jsonl", ["c", "b", "c", "d"])
    request = replace(PLAIN, sources=(str(first), str(second)), deduplicate=True)
    store = prepare_corpora(request, tmp_path / "stores", map).store
    assert texts_of(store) == {
        "0:first.jsonl#0": "a",
        "0:first.jsonl#1": "b",
        "1:second.jsonl#0": "c",
        "1:second.jsonl#3": "d",
    }
    assert [source.dropped.duplicates if source.dropped else 0 for source in store.manifest.sources] == [1, 2]
    assert [source.name for source in store.manifest.sources] == [str(first), str(second)]


def test_every_option_makes_another_store_and_the_same_ones_the_same(corpus: Path, tmp_path: Path) -> None:
    first, second = str(write_lines(corpus / "a.jsonl", texts(30))), str(write_lines(corpus / "b.jsonl", texts(30, 90)))
    request = replace(PLAIN, sources=(first, second))
    requests = [
        request,
        replace(request, sources=(second, first)),
        replace(request, sources=(first,)),
        replace(request, deduplicate=True),
        replace(request, min_chars=10),
        replace(request, max_chars=400),
        replace(request, weights=(1.0, 2.0)),
        replace(request, weights=(1.0, 3.0)),
        replace(request, holdout=0.2),
        replace(request, difficulty="length"),
    ]
    stores = [prepare_corpora(each, tmp_path / "stores", map).store for each in requests]
    assert len({store.directory for store in stores}) == len(requests)
    for each, store in zip(requests, stores, strict=True):
        again = prepare_corpora(each, tmp_path / "stores", map)
        assert again.found and again.store.digest == store.digest
        elsewhere = prepare_corpora(each, tmp_path / "elsewhere", shuffled)
        assert not elsewhere.found and elsewhere.store.digest == store.digest


def test_weights_are_shares_of_the_tokens_to_train_on(corpus: Path, tmp_path: Path) -> None:
    first, second = write_lines(corpus / "a.jsonl", texts(300)), write_lines(corpus / "b.jsonl", texts(200, 1000))
    request = replace(PLAIN, sources=(str(first), str(second)), weights=(1.0, 4.0))
    store = prepare_corpora(request, tmp_path / "stores", shuffled).store
    ids, tokens = ids_of(store), {"0": 0, "1": 0}
    for number, _, length, _ in store.index("train").tolist():
        tokens[ids[number][0]] += length
    assert tokens["0"] / sum(tokens.values()) == pytest.approx(0.2, abs=0.01)
    everything = prepare_corpora(replace(request, weights=None), tmp_path / "stores", map).store
    for split in ("train", "validation"):
        mine, whole = set(store.index(split)["document"].tolist()), set(everything.index(split)["document"].tolist())
        assert mine <= whole and (mine == whole) == (split == "validation")
    surplus = everything.manifest.splits["train"].num_documents - store.manifest.splits["train"].num_documents
    dropped = store.manifest.sources[0].dropped
    assert dropped is not None and dropped.surplus == surplus
    assert store.manifest.sources[1].dropped is None


# -- bad input -------------------------------------------------------------------------------------------------------


def write_bad(folder: Path) -> dict[str, tuple[int, str]]:
    """Good rows, and bad ones in files of every kind; line and reason of each by the file's name."""
    write_lines(folder / "good.jsonl", texts(60))
    (folder / "utf8.txt").write_bytes(b"one\ncaf\xe9\n")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "empty.jsonl").write_bytes(b"\n\n")
    (folder / "lines.jsonl").write_bytes(b'{"text": "one"}\n{"text": "t\xffo"}\n{"text": "three"}\n')
    (folder / "broken.jsonl").write_bytes(b'{"text": "a line"}\n{"text": \n')
    (folder / "key.jsonl").write_bytes(b'{"body": "text"}\n')
    (folder / "half.jsonl").write_bytes(b'{"text": "\\ud83d"}\n')
    write_lines(folder / "cut.jsonl.gz", texts(200, 500))
    cut = folder / "cut.jsonl.gz"
    cut.write_bytes(cut.read_bytes()[:1000])
    (folder / "cut.txt.gz").write_bytes(gzip.compress(b"text" * 100)[:20])
    (folder / "none.parquet").write_bytes(b"PAR1 no table PAR1")
    return {
        "utf8.txt": (2, "not UTF-8: byte 0xe9"),
        "empty.txt": (1, "no text in this file"),
        "empty.jsonl": (1, "no text in this file"),
        "lines.jsonl": (2, "not UTF-8: byte 0xff"),
        "broken.jsonl": (2, "not JSON"),
        "key.jsonl": (1, "no key 'text'"),
        "half.jsonl": (1, "half of a surrogate pair"),
        "cut.txt.gz": (1, "cut off"),
        "none.parquet": (1, "no parquet file"),
    }


def test_bad_records_are_named_in_the_quarantine_and_left_out(corpus: Path, tmp_path: Path) -> None:
    wanted = write_bad(corpus)
    done = prepare_corpora(replace(PLAIN, sources=(str(corpus),), max_bad=0.5), tmp_path / "stores", shuffled)
    assert done.quarantine == done.store.directory.with_name(f"{done.store.directory.name}.quarantine.jsonl")
    entries = {Path(entry["file"]).name: entry for entry in map(json.loads, done.quarantine.read_text().splitlines())}
    cut = entries.pop("cut.jsonl.gz")
    assert "the rest of the file is lost" in cut["reason"]
    assert entries.keys() == wanted.keys()
    for name, (line, reason) in wanted.items():
        assert entries[name]["line"] == line and reason in entries[name]["reason"]
        assert entries[name]["source"] == str(corpus)
    assert "caf" not in done.quarantine.read_text()
    [source] = done.store.manifest.sources
    assert source.dropped is not None and source.dropped.bad == 8
    found = texts_of(done.store)
    assert found["lines.jsonl#0"] == "one" and found["lines.jsonl#2"] == "three" and "lines.jsonl#1" not in found
    assert found["cut.jsonl.gz#0"] == texts(1, 500)[0]


def test_too_many_bad_records_prevent_the_store(corpus: Path, tmp_path: Path) -> None:
    write_bad(corpus)
    with pytest.raises(
        DataError, match=r"8 of \d+ records are bad, more than max_bad 0.01 allows: .*:2: not JSON"
    ) as no:
        prepare_corpora(replace(PLAIN, sources=(str(corpus),), max_bad=0.01), tmp_path / "stores", map)
    [named] = (tmp_path / "stores").iterdir()
    assert str(named) in no.value.remedy
    assert len(named.read_text().splitlines()) == 10


def test_file_names_may_be_any_bytes(corpus: Path, tmp_path: Path) -> None:
    """As long as the system gives them; they come into ids, tasks and the quarantine."""
    for number, text in enumerate(texts(9)):
        Path(os.fsdecode(os.fsencode(corpus) + b"/\xff%d.txt" % number)).write_text(text)
    Path(os.fsdecode(os.fsencode(corpus) + b"/bad\xff.jsonl")).write_text("no JSON")
    done = prepare_corpora(replace(PLAIN, sources=(str(corpus),), max_bad=0.5), tmp_path / "stores", map)
    assert done.quarantine is not None
    assert os.fsencode(json.loads(done.quarantine.read_text())["file"]).endswith(b"/bad\xff.jsonl")
    assert [os.fsencode(name) for name in ids_of(done.store)] == [b"\xff%d.txt" % number for number in range(9)]


def test_a_wrong_text_key_is_named_in_the_reason(corpus: Path, tmp_path: Path) -> None:
    write_lines(corpus / "a.jsonl", texts(9))
    with pytest.raises(DataError, match="9 of 9 records are bad.*no key 'body'; it has 'text'"):
        prepare_corpora(replace(PLAIN, sources=(str(corpus),), text_key="body"), tmp_path / "stores", map)


def test_the_prepare_of_a_job_names_what_is_bad_too(corpus: Path, tmp_path: Path) -> None:
    path = write_lines(corpus / "a.jsonl.gz", texts(200))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match=r"1 of \d+ records are bad.*a\.jsonl\.gz.*gzip"):
        prepare(str(path), 300, 0.3, tmp_path / "stores")
    (corpus / "b.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "\\ud83d"}\n')
    with pytest.raises(DataError, match=r"b\.jsonl:2: half of a surrogate pair"):
        prepare(str(corpus / "b.jsonl"), 300, 0.3, tmp_path / "stores")
    assert [path.name for path in (tmp_path / "stores").iterdir()] == ["quarantine.jsonl"]


@pytest.fixture
def own_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.chdir(tmp_path)
    Path("own_bulk_signal.py").touch()
    return imported("own_bulk_signal", tmp_path)


@pytest.mark.parametrize(
    ("worth", "what"),
    [
        pytest.param(lambda text: float("nan"), "gave nan", id="nan"),
        pytest.param(lambda text: 1 / 0, "raised ZeroDivisionError: division by zero", id="raises"),
    ],
)
def test_an_invalid_score_is_named_with_file_and_line(
    corpus: Path, tmp_path: Path, own_signal: ModuleType, worth: Callable[[str], float], what: str
) -> None:
    rows = texts(60)
    path = write_lines(corpus / "a.jsonl", [*rows[:30], "the odd one", *rows[30:]])
    own_signal.score = lambda text: worth(text) if text == "the odd one" else 1.0  # type: ignore[attr-defined]
    request = replace(PLAIN, sources=(str(path),), difficulty="own_bulk_signal:score")
    with pytest.raises(DataError) as raised:
        prepare_corpora(request, tmp_path / "stores", map)
    assert f"own_bulk_signal:score {what} for the document a.jsonl#30 ({path}:31)" in str(raised.value)
    assert all(path.name.startswith(".") for path in (tmp_path / "stores").iterdir())
    own_signal.score = lambda text: float(len(text))  # type: ignore[attr-defined]
    store = prepare_corpora(request, tmp_path / "stores", map).store
    assert len(texts_of(store)) == 61


def test_an_unknown_signal_is_refused_before_anything_is_read(corpus: Path, tmp_path: Path) -> None:
    for signal in ("rareness", "nowhere.to_be_found:score"):
        with pytest.raises(DataError, match=signal):
            prepare_corpora(replace(PLAIN, sources=(str(corpus / "gone"),), difficulty=signal), tmp_path / "s", map)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"holdout": 1.0}, "data.holdout is 1.0"),
        ({"min_chars": 0}, "min_chars 0"),
        ({"min_chars": 9, "max_chars": 8}, "max_chars 8"),
        ({"max_bad": 1.5}, "max_bad 1.5"),
        ({"weights": (1.0,)}, "1 weights for 1 sources"),
        ({"sources": ("a.txt",) * 2, "weights": (1.0,)}, "1 weights for 2 sources"),
        ({"sources": ("a.txt",) * 2, "weights": (1.0, float("nan"))}, "nan"),
        ({"sources": ("a.txt",) * 2, "weights": (1.0, 0.0)}, "above 0"),
        ({"sources": ("a.txt", "gone")}, "gone doesn't exist"),
    ],
    ids=str,
)
def test_an_option_out_of_range_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("some text")
    with pytest.raises(DataError, match=message):
        prepare_corpora(replace(PLAIN, **{"sources": ("a.txt",), **change}), tmp_path / "stores", map)  # type: ignore[arg-type]


def test_a_corpus_without_text_is_refused(corpus: Path, tmp_path: Path) -> None:
    (corpus / "a.txt").write_text(" ")
    with pytest.raises(DataError, match="is empty: 1 files, none with text"):
        prepare_corpora(replace(PLAIN, sources=(str(corpus),)), tmp_path / "stores", map)
    write_lines(corpus / "b.jsonl", ["short", "short"])
    with pytest.raises(DataError, match="is empty: 2 files, all left out: 2 shorter"):
        prepare_corpora(replace(PLAIN, sources=(str(corpus),), min_chars=9), tmp_path / "stores", map)


@pytest.mark.parametrize("change", ["text", "fewer", "gone", "more"])
@pytest.mark.parametrize("stage", ["tokenizer", "encoding"])
def test_a_corpus_that_changes_under_way_is_noticed(corpus: Path, tmp_path: Path, stage: str, change: str) -> None:
    path = write_lines(corpus / "a.jsonl", texts(60))

    def on_progress(now: str, fraction: float) -> None:
        if now == stage and fraction == 0:
            rows = {"text": ["Other", *texts(60)[1:]], "fewer": texts(59), "more": ["More", *texts(60)], "gone": []}
            write_lines(path, rows[change])

    with pytest.raises(DataError, match="the corpus changed while it was read: .*a.jsonl"):
        prepare_corpora(replace(PLAIN, sources=(str(path),)), tmp_path / "stores", map, on_progress)
    assert all(found.name.startswith(".") for found in (tmp_path / "stores").iterdir())


# -- going on --------------------------------------------------------------------------------------------------------


def test_finished_parts_are_reused_and_no_others(corpus: Path, tmp_path: Path) -> None:
    request = replace(PLAIN, sources=(str(write_folder(corpus)),))
    whole = prepare_corpora(request, tmp_path / "whole", map)

    def interrupted(function: Callable[[str], str], tasks: Sequence[str]) -> Iterable[str]:
        for number, task in enumerate(tasks):
            if function.__name__ == "encode_block" and number == 4:
                raise KeyboardInterrupt
            yield function(task)

    with pytest.raises(KeyboardInterrupt):
        prepare_corpora(request, tmp_path / "stores", interrupted)
    [hidden] = (tmp_path / "stores").glob(".*")
    assert whole.store.directory.name not in os.listdir(tmp_path / "stores")
    assert hidden.name == f".{whole.store.directory.name}.parts"
    parts = sorted(hidden.glob("*.part"))
    assert len(parts) == 4
    with pytest.raises(DataError, match="is no token store"):
        TokenStore.open(hidden)

    content = bytearray(parts[1].read_bytes())
    content[3] ^= 1
    parts[1].write_bytes(content)  # damaged meanwhile
    kept = {path: path.stat().st_mtime_ns for path in parts}
    seen: dict[Path, int] = {}
    asked: list[str] = []

    def looking(function: Callable[[str], str], tasks: Sequence[str]) -> Iterable[str]:
        asked.append(function.__name__)
        yield from map(function, tasks)
        seen.update({path: path.stat().st_mtime_ns for path in parts})

    done = prepare_corpora(request, tmp_path / "stores", looking)
    assert asked == ["encode_block"]  # the tokenizer was kept
    assert [seen[path] == kept[path] for path in parts] == [True, False, True, True]
    assert contents(done.store) == contents(whole.store)
    assert list((tmp_path / "stores").glob(".*")) == []


def test_parts_of_another_corpus_are_never_used(corpus: Path, tmp_path: Path) -> None:
    """Even under the right name: parts of the same number that hold other text."""
    path = write_lines(corpus / "a.jsonl", texts(60))
    request = replace(PLAIN, sources=(str(path),))

    def stop(function: Callable[[str], str], tasks: Sequence[str]) -> Iterable[str]:
        yield from map(function, tasks)
        if function.__name__ == "encode_block":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_corpora(request, tmp_path / "stores", stop)
    [old] = (tmp_path / "stores").iterdir()
    write_lines(path, texts(60, 7))
    wanted = prepare_corpora(request, tmp_path / "wanted", map)
    old.rename(old.with_name(f".{wanted.store.directory.name}.parts"))
    found = prepare_corpora(replace(request, tokenizer=None), tmp_path / "stores", map)
    assert texts_of(found.store) == texts_of(wanted.store)


def test_a_part_that_is_lost_before_the_end_is_an_error(corpus: Path, tmp_path: Path) -> None:
    def losing(function: Callable[[str], str], tasks: Sequence[str]) -> Iterable[str]:
        yield from map(function, tasks)
        for part in (tmp_path / "stores").glob(".*/00000001.part"):
            part.unlink()

    with pytest.raises(StoreCorrupt, match=r"00000001\.part was written, but is missing"):
        prepare_corpora(replace(PLAIN, sources=(str(write_folder(corpus)),)), tmp_path / "stores", losing)
    assert not [path for path in (tmp_path / "stores").glob("store-*") if path.is_dir()]


def test_a_directory_that_cannot_be_written_is_named(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="can't be written to .*file/stores"):
        prepare_corpora(replace(PLAIN, sources=(str(write_folder(corpus)),)), tmp_path / "file/stores", map)


# -- the store of a job ----------------------------------------------------------------------------------------------


def test_a_job_may_name_the_store(corpus: Path, tmp_path: Path) -> None:
    store = prepare_corpora(
        replace(PLAIN, sources=(str(write_folder(corpus)),), difficulty="length"), tmp_path / "stores", map
    ).store
    source = str(store.directory)
    for options in ({}, {"vocab_size": 300}, {"holdout": 0.3}, {"difficulty": "length"}):
        asked = {"vocab_size": 2048, "holdout": 0.05} | options
        found = prepare(source, directory=tmp_path / "unused", tokenizer=None, **asked)  # type: ignore[arg-type]
        assert found.directory == store.directory and found.digest == store.digest
    found = prepare(source, 2048, 0.05, tmp_path / "unused", tokenizer=store.directory / TOKENIZER)
    assert found.digest == store.digest
    assert not (tmp_path / "unused").exists()


def test_a_job_with_other_settings_than_the_store_is_refused(corpus: Path, tmp_path: Path) -> None:
    store = prepare_corpora(replace(PLAIN, sources=(str(write_folder(corpus)),)), tmp_path / "stores", map).store
    source = str(store.directory)
    other = prepare(str(corpus), 290, 0.3, tmp_path / "other").directory / TOKENIZER
    with pytest.raises(DataError, match="data.vocab_size is 400, and the store .* was prepared with 300"):
        prepare(source, 400, 0.05, tmp_path)
    with pytest.raises(DataError, match="data.holdout is 0.2, and the store .* was prepared with 0.3"):
        prepare(source, 2048, 0.2, tmp_path)
    with pytest.raises(DataError, match="curriculum.signal is rarity, and the store .* was prepared with none"):
        prepare(source, 2048, 0.05, tmp_path, difficulty="rarity")
    with pytest.raises(DataError, match="the digest of data.tokenizer is"):
        prepare(source, 2048, 0.05, tmp_path, tokenizer=other)


def test_a_damaged_store_is_no_source(corpus: Path, tmp_path: Path) -> None:
    store = prepare_corpora(replace(PLAIN, sources=(str(write_folder(corpus)),)), tmp_path / "stores", map).store
    path = store.directory / "train.tokens"
    path.write_bytes(path.read_bytes()[:-2] + b"\0\0")
    with pytest.raises(StoreCorrupt, match=r"train\.tokens"):
        prepare(str(store.directory), 2048, 0.05, tmp_path)


def test_a_store_is_no_text(corpus: Path, tmp_path: Path) -> None:
    store = prepare_corpora(replace(PLAIN, sources=(str(write_folder(corpus)),)), tmp_path / "stores", map).store
    with pytest.raises(DataError, match="is a prepared token store, not text"):
        prepare_corpora(replace(PLAIN, sources=(str(store.directory),)), tmp_path / "again", map)


def test_the_manifest_of_a_plain_store_has_no_new_keys(corpus: Path, tmp_path: Path) -> None:
    """Stores that were made before keep their digest and can be read."""
    store = prepare(str(write_folder(corpus)), 300, 0.3, tmp_path / "stores")
    saved = json.loads((store.directory / "manifest.json").read_text())
    assert saved["options"].keys() == {"vocab_size", "holdout", "tokenizer_train_bytes", "tokenizer", "difficulty"}
    assert saved["sources"][0].keys() == {"name", "digest", "num_documents", "num_bytes"}
    assert (
        StoreManifest.model_validate(StoreManifest.model_validate_json(json.dumps(saved)).model_dump())
        == store.manifest
    )


def test_pydocs_are_read_or_the_error_names_their_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.data.corpus.sources.PYDOCS", tmp_path / "_sources")
    request = replace(PLAIN, sources=("builtin:pydocs",))
    with pytest.raises(DataError, match="builtin:pydocs") as raised:
        prepare_corpora(request, tmp_path / "stores", map)
    assert "apt-get install python3.13-doc" in raised.value.remedy
    for name in ("about.rst.txt", "library/os.rst.txt", "library/page.html"):
        (tmp_path / "_sources" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "_sources" / name).write_text(f"{name}\n======\n")
    assert ids_of(prepare_corpora(request, tmp_path / "stores", map).store) == ["about.rst.txt", "library/os.rst.txt"]


def test_memory_per_document_is_small(tmp_path: Path) -> None:
    """Of 5,000 documents nothing but flags, digests and the index may stay: measured where nothing else grows."""
    import tracemalloc

    path = write_lines(tmp_path / "a.jsonl", (f"{hashlib.sha256(str(n).encode()).hexdigest()}" for n in range(5_000)))
    request = replace(PLAIN, sources=(str(path),), deduplicate=True)
    prepare_corpora(request, tmp_path / "warm", map)
    sizes = []

    def on_progress(stage: str, fraction: float) -> None:
        if stage == "encoding" and fraction == 0.0:
            sizes.append(tracemalloc.get_traced_memory()[0])

    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    prepare_corpora(request, tmp_path / "stores", map, on_progress)
    tracemalloc.stop()
    assert os.path.getsize(path) > 5_000 * 64
    assert (sizes[0] - before) / 5_000 < 120  # the held blocks' bits, digests, split and, per block, its places
