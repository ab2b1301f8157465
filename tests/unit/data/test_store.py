import json
import tempfile
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.manifest import BLOCK_BYTES, DOCUMENTS, INDEX_DTYPE
from orchestrator.data.prepare.store_writer import StoreWriter
from orchestrator.data.store import IGNORED_TARGET, TokenStore
from orchestrator.errors import DataError, StoreCorrupt
from orchestrator.sampling.chunks import Spans
from tests.unit.data.stores import BYTES_ONLY, write_store

FILES = [
    "documents.jsonl",
    "tokenizer.json",
    "train.digests",
    "train.index.npy",
    "train.tokens",
    "validation.digests",
    "validation.index.npy",
    "validation.tokens",
]


def test_rows_written_out_by_hand(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", train_lengths=[5, 1, 7])  # 13 tokens: * 2 3 4 5 * * 8 9 10 11 12 13
    border = BYTES_ONLY.document_token
    assert store.num_rows("train", 4) == 3
    rows = store.rows("train", np.array([1, 0, 2]), 4)
    assert rows.inputs_RT.tolist() == [[5, border, border, 8], [border, 2, 3, 4], [9, 10, 11, 12]]
    assert rows.targets_RT.tolist() == [[-100, -100, 8, 9], [2, 3, 4, 5], [10, 11, 12, 13]]
    assert rows.documents_RT.tolist() == [[0, 1, 2, 2], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert (rows.inputs_RT.dtype, rows.targets_RT.dtype, rows.documents_RT.dtype) == (np.int64, np.int64, np.int32)
    assert store.target_count("train", store.spans("train", np.array([1, 0, 2]), 4)) == 10


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=30),
    sequence_length=st.integers(1, 20),
    data=st.data(),
)
def test_rows_tile_the_stream_and_targets_are_counted_without_reading(
    lengths: list[int], sequence_length: int, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        store = write_store(Path(directory) / "store", lengths)
    stream = np.array(_stream(lengths))
    num_rows = store.num_rows("train", sequence_length)
    assert num_rows == (sum(lengths) - 1) // sequence_length
    rows = store.rows("train", np.arange(num_rows), sequence_length)
    used = num_rows * sequence_length
    targets = rows.targets_RT.reshape(-1)
    assert np.array_equal(rows.inputs_RT.reshape(-1), stream[:used])
    starts_document = stream[1 : used + 1] == BYTES_ONLY.document_token
    assert np.array_equal(targets == IGNORED_TARGET, starts_document)
    assert np.array_equal(targets[~starts_document], stream[1 : used + 1][~starts_document])
    for row_inputs, row_documents in zip(rows.inputs_RT, rows.documents_RT, strict=True):
        borders = row_inputs == BYTES_ONLY.document_token
        borders[0] = False
        assert np.array_equal(row_documents, np.cumsum(borders))
    if num_rows:
        chosen = np.array(data.draw(st.lists(st.integers(0, num_rows - 1), max_size=12)), np.int64)
        counted = np.count_nonzero(store.rows("train", chosen, sequence_length).targets_RT != IGNORED_TARGET)
        assert store.target_count("train", store.spans("train", chosen, sequence_length)) == counted


def _stream(lengths: list[int]) -> list[int]:
    stream: list[int] = []
    for length in lengths:
        stream.append(BYTES_ONLY.document_token)
        stream.extend(1 + position % 200 for position in range(len(stream), len(stream) + length - 1))
    return stream


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=12), data=st.data())
def test_scattered_tokens_are_read_each_with_the_one_that_follows_it(lengths: list[int], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as directory:
        store = write_store(Path(directory) / "store", lengths)
    stream, total = _stream(lengths), sum(lengths)
    length = data.draw(st.integers(1, 6))
    rows = data.draw(st.integers(0, 3))
    spans: list[tuple[int, int]] = []
    while (missing := rows * length - sum(n for _, n in spans)) > 0:
        start = data.draw(st.integers(0, total - 1))
        spans.append((start, data.draw(st.integers(1, min(missing, total - start)))))
    where = Spans(np.array([s for s, _ in spans], np.int64), np.array([n for _, n in spans], np.int64))
    read = store.read("train", where, length)
    places = [place for start, n in spans for place in range(start, start + n)]
    assert read.inputs_RT.reshape(-1).tolist() == [stream[place] for place in places]
    borders = {place for place in range(total) if stream[place] == BYTES_ONLY.document_token} | {total}
    wanted = [IGNORED_TARGET if place + 1 in borders else stream[place + 1] for place in places]
    assert read.targets_RT.reshape(-1).tolist() == wanted
    assert store.target_count("train", where) == sum(target != IGNORED_TARGET for target in wanted)
    for row, segments in enumerate(read.documents_RT.tolist()):
        inside = places[row * length : (row + 1) * length]
        breaks = [b != a + 1 or b in borders for a, b in pairwise(inside)]
        assert segments == [sum(breaks[:n]) for n in range(length)]


def test_tokens_beyond_the_split_are_refused(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [20])
    for start in (-1, 18):
        with pytest.raises(ValueError, match="train has 20"):
            store.read("train", Spans(np.array([start]), np.array([3])), 3)


def test_a_request_for_no_rows_is_valid(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [20])
    assert store.rows("train", np.array([], np.int64), 4).inputs_RT.shape == (0, 4)
    assert store.target_count("train", store.spans("train", np.array([], np.int64), 4)) == 0


@pytest.mark.parametrize("row", [-1, 4])
def test_a_row_that_does_not_exist_is_refused(tmp_path: Path, row: int) -> None:
    store = write_store(tmp_path / "store", [20])
    with pytest.raises(ValueError, match="train has 4 rows of 4 tokens"):
        store.rows("train", np.array([0, row]), 4)
    with pytest.raises(ValueError, match="train has 4 rows of 4 tokens"):
        store.target_count("train", store.spans("train", np.array([0, row]), 4))


def test_splits_and_index(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [5, 3], [4, 2])
    index = store.index("validation")
    assert index.dtype == INDEX_DTYPE
    assert index["document"].tolist() == [2, 3]
    assert index["offset"].tolist() == [0, 4]
    assert index["length"].tolist() == [4, 2]
    assert np.isnan(index["score"]).all()
    assert (store.num_tokens("train"), store.num_tokens("validation")) == (8, 6)
    documents = (store.directory / DOCUMENTS).read_text().splitlines()
    assert json.loads(documents[2]) == "document 2"
    assert store.tokenizer().digest == store.manifest.tokenizer_digest


def test_large_vocabularies_take_four_bytes_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BYTES_ONLY, "vocab_size", (1 << 16) + 1)
    store = write_store(tmp_path / "store", [20])
    assert (tmp_path / "store/train.tokens").stat().st_size == 80
    assert store.rows("train", np.array([0]), 4).inputs_RT.tolist() == [[BYTES_ONLY.document_token, 2, 3, 4]]


def test_a_token_that_does_not_fit_is_never_written(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, BYTES_ONLY)
    with pytest.raises(OverflowError):
        writer.add("train", 0, [70_000])
    writer.close()


def test_each_block_of_tokens_has_a_digest(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [200_000])
    tokens, digests = ((store.directory / f"train.{kind}").read_bytes() for kind in ("tokens", "digests"))
    blocks = [tokens[start : start + BLOCK_BYTES] for start in range(0, len(tokens), BLOCK_BYTES)]
    assert len(blocks) == 2 and len(blocks[1]) == 400_000 - BLOCK_BYTES
    assert digests == b"".join(sha256(block).digest() for block in blocks)


def test_every_file_has_a_digest(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [20])
    assert sorted(store.manifest.files) == FILES
    assert sorted(path.name for path in store.directory.iterdir()) == sorted([*FILES, "manifest.json"])


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_is_found_when_verifying(tmp_path: Path, name: str) -> None:
    store = write_store(tmp_path / "store", [20])
    path = store.directory / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreCorrupt) as raised:
        TokenStore.open(store.directory, verify=True)
    recorded = store.manifest.files[name].sha256
    assert name in raised.value.message
    assert recorded in raised.value.message
    assert raised.value.message.count("sha256") == 1
    assert str(store.directory) in raised.value.remedy
    assert raised.value.unchanged == "Nothing was written."


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_file_cut_short_or_gone_is_found_always(tmp_path: Path, name: str, damage: str) -> None:
    store = write_store(tmp_path / "store", [20])
    path = store.directory / name
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    with pytest.raises(StoreCorrupt, match=name) as raised:
        TokenStore.open(store.directory)
    assert store.manifest.files[name].sha256 in str(raised.value)


@pytest.mark.parametrize("manifest", ["", "{}", '{"format_version": 2}'])
def test_a_damaged_manifest_is_found(tmp_path: Path, manifest: str) -> None:
    store = write_store(tmp_path / "store", [20])
    (store.directory / "manifest.json").write_text(manifest)
    with pytest.raises(StoreCorrupt, match=r"manifest\.json is damaged or of another version"):
        TokenStore.open(store.directory)


def test_no_store_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no token store"):
        TokenStore.open(tmp_path)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    """An index of Python objects would run code when loaded."""
    store = write_store(tmp_path / "store", [20])
    path = store.directory / "train.index.npy"
    np.save(path, np.array([{"a": 1}], object), allow_pickle=True)
    manifest = json.loads((store.directory / "manifest.json").read_text())
    manifest["files"]["train.index.npy"]["num_bytes"] = path.stat().st_size
    (store.directory / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreCorrupt, match="is no array"):
        TokenStore.open(store.directory)
