"""Tokens of a store in a bucket: right ones whatever happens to the bucket, the disk and other processes."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from orchestrator.data.bucket_store import open_store, upload
from orchestrator.data.manifest import BLOCK_BYTES
from orchestrator.data.store import TokenStore
from orchestrator.errors import StoreCorrupt
from orchestrator.sampling.chunks import Spans
from orchestrator.storage.backends import location
from orchestrator.storage.backends.bucket_url import BucketUrl
from orchestrator.storage.backends.location import objects_at
from orchestrator.storage.backends.patience import Patience
from tests.support.disk import fill, small_disk
from tests.support.request_proxy import RequestFault, RequestProxy
from tests.unit.data.stores import write_store

LENGTH = 64
BLOCK_TOKENS = BLOCK_BYTES // 2
number = count()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """A store of 15 whole blocks of training tokens and a part of one."""
    return write_store(tmp_path_factory.mktemp("store") / "original", [200_000] * 10)


@pytest.fixture
def place(bucket: tuple[str, RequestProxy], store: TokenStore) -> BucketUrl:
    bucket[1].forget()
    place = BucketUrl(bucket[0]) / ".data" / f"blocks{next(number)}"  # servers of one process share buckets
    upload(store.directory, store.manifest.files, place)
    return place


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def _rows(store: TokenStore, rows: np.ndarray) -> np.ndarray:
    found = store.rows("train", rows, LENGTH)
    return np.stack((found.inputs_RT, found.targets_RT, found.documents_RT))


def _blocks(first: int, number: int = 1) -> np.ndarray:
    """Rows, one of each block."""
    return np.arange(first, first + number) * (BLOCK_TOKENS // LENGTH) + 3


def _assert_same(opened: TokenStore, store: TokenStore) -> None:
    rows = np.arange(store.num_rows("train", LENGTH))
    assert (_rows(opened, rows) == _rows(store, rows)).all()


def test_any_tokens_are_those_of_the_store(store: TokenStore, place: BucketUrl, proxy: RequestProxy) -> None:
    opened, random = open_store(place), np.random.default_rng(5)
    total = store.num_tokens("train")
    for _ in range(40):
        length = int(random.integers(1, 2 * BLOCK_TOKENS if random.random() < 0.1 else 3000))
        start_S = random.integers(0, total - length, 5)
        spans = Spans(np.append(start_S, total - length), np.full(6, length))
        for found, wanted in zip(
            vars(opened.read("train", spans, length)).values(),
            vars(store.read("train", spans, length)).values(),
            strict=True,
        ):
            assert (found == wanted).all() if wanted is not None else found is None
    assert opened.read("train", Spans(np.arange(0), np.arange(0)), 4).inputs_RT.shape == (0, 4)
    found_RT, wanted_RT = (s.rows("validation", np.arange(2), 4).inputs_RT for s in (opened, store))
    assert (found_RT == wanted_RT).all()
    proxy.forget()
    _assert_same(open_store(place), store)  # as another process would find it
    assert proxy.requests["GET"] == 0


def test_a_row_fetches_its_block_and_rows_in_sequence_one_for_sixteen_blocks(
    store: TokenStore, place: BucketUrl, proxy: RequestProxy
) -> None:
    opened = open_store(place)
    proxy.forget()
    for _ in range(2):
        assert (_rows(opened, _blocks(5)) == _rows(store, _blocks(5))).all()
    assert proxy.requests["GET"] == 1
    _assert_same(opened, store)
    assert proxy.requests["GET"] == 1 + 2  # blocks 0 to 4 and 6 to 15
    with (opened.directory / "train.blocks").open("rb") as cache:
        assert cache.read() == (store.directory / "train.tokens").read_bytes()


def test_prefetched_rows_are_present(store: TokenStore, place: BucketUrl, proxy: RequestProxy) -> None:
    opened, rows = open_store(place), _blocks(2, 7)
    assert opened.fetch("train", opened.spans("train", rows, LENGTH))
    proxy.forget()
    with proxy.failing("GET", RequestFault.FORBIDDEN):
        assert (_rows(opened, rows) == _rows(store, rows)).all()
    last = np.array([store.num_rows("train", LENGTH) - 1])
    assert opened.fetch("train", opened.spans("train", last, LENGTH))
    assert proxy.requests["GET"] == 1


def test_threads_that_need_the_same_block_share_its_request(
    store: TokenStore, place: BucketUrl, proxy: RequestProxy
) -> None:
    opened, same = open_store(place), []
    proxy.forget()
    threads = [
        threading.Thread(target=lambda: same.append((_rows(opened, _blocks(7)) == _rows(store, _blocks(7))).all()))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 6 and proxy.requests["GET"] == 1


FAULTS = (RequestFault.UNAVAILABLE, RequestFault.TORN, RequestFault.LOST_REQUEST, RequestFault.FLIPPED, None)


def test_requests_that_fail_are_made_again(store: TokenStore, place: BucketUrl, proxy: RequestProxy) -> None:
    opened = open_store(place)
    proxy.fail("GET", *(8 * FAULTS))
    random = np.random.default_rng(3)
    for block in random.permutation(16):
        assert (_rows(opened, _blocks(block)) == _rows(store, _blocks(block))).all()
    proxy.fail("GET")
    _assert_same(opened, store)


def test_a_bucket_that_hangs_is_an_error_and_no_loss(
    store: TokenStore, place: BucketUrl, proxy: RequestProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(location.objects_at, "__defaults__", (Patience(answer_s=3.0, retry_s=3.0),))
    opened = open_store(place)
    _rows(opened, _blocks(1))
    with proxy.failing("GET", RequestFault.STALL):
        with pytest.raises(OSError, match="no answer in time"):
            _rows(opened, _blocks(0, 3))
        assert (_rows(opened, _blocks(1)) == _rows(store, _blocks(1))).all()
    _assert_same(opened, store)


def test_a_block_that_is_damaged_in_the_bucket_is_fetched_twice_and_named(
    store: TokenStore, place: BucketUrl, proxy: RequestProxy
) -> None:
    objects, tokens = objects_at(place), bytearray((store.directory / "train.tokens").read_bytes())
    tokens[5 * BLOCK_BYTES + 17] ^= 4
    objects.delete(["train.tokens"])
    objects.create("train.tokens", bytes(tokens))
    opened = open_store(place)
    proxy.forget()
    with pytest.raises(StoreCorrupt, match=f"block 5 of {place}/train.tokens, bytes 1310720 to 1572864, has") as raised:
        _rows(opened, _blocks(5))
    assert proxy.requests["GET"] == 2
    assert f"Delete {place}/train.tokens and resume the run" in raised.value.remedy
    assert (_rows(opened, _blocks(6)) == _rows(store, _blocks(6))).all()
    objects.delete(["train.tokens"])
    with pytest.raises(StoreCorrupt, match=f"{place}/train.tokens is no longer there"):
        _rows(opened, _blocks(8))
    upload(store.directory, store.manifest.files, place)
    _assert_same(opened, store)


@pytest.mark.parametrize("damage", ["flipped", "torn", "cut", "gone", "zeros"])
def test_a_block_that_is_damaged_on_the_node_is_fetched_again(
    store: TokenStore, place: BucketUrl, proxy: RequestProxy, damage: str
) -> None:
    cache = open_store(place).directory / "train.blocks"
    _assert_same(open_store(place), store)
    with cache.open("r+b") as file:
        if damage == "cut":
            file.truncate(3 * BLOCK_BYTES + 100)
        elif damage != "gone":
            file.seek(3 * BLOCK_BYTES)
            block = bytearray(file.read(BLOCK_BYTES))
            block[-1] ^= 1
            half = BLOCK_BYTES // 2
            written = {"flipped": block, "torn": block[:half] + bytes(half), "zeros": bytes(BLOCK_BYTES)}
            file.seek(3 * BLOCK_BYTES)
            file.write(written[damage])
    if damage == "gone":
        cache.unlink()
    proxy.forget()
    opened = open_store(place)
    assert (_rows(opened, _blocks(2)) == _rows(store, _blocks(2))).all()
    assert proxy.requests["GET"] == (damage == "gone")
    assert (_rows(opened, _blocks(3)) == _rows(store, _blocks(3))).all()
    assert proxy.requests["GET"] == 1 + (damage == "gone")
    _assert_same(open_store(place), store)


def test_a_file_that_changes_under_a_reader_gives_no_wrong_row(
    store: TokenStore, place: BucketUrl, proxy: RequestProxy
) -> None:
    opened = open_store(place)
    _assert_same(opened, store)
    cache = opened.directory / "train.blocks"
    os.truncate(cache, 0)
    os.truncate(cache, 10 * BLOCK_BYTES)  # holes
    proxy.forget()
    for block in (3, 12):
        assert (_rows(opened, _blocks(block)) == _rows(store, _blocks(block))).all()
    assert proxy.requests["GET"] == 2
    _assert_same(opened, store)


@pytest.fixture
def small_home(home: Path) -> Iterator[Path]:
    with small_disk(home, 4) as disk:
        yield disk


def test_a_full_disk_keeps_no_blocks_and_every_row_is_read(
    store: TokenStore, place: BucketUrl, proxy: RequestProxy, small_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened = open_store(place)
    _rows(opened, _blocks(1))
    filler = fill(small_home, leave=BLOCK_BYTES // 2)
    assert not opened.fetch("train", opened.spans("train", _blocks(4, 3), LENGTH))
    _assert_same(opened, store)
    assert len([r for r in caplog.records if "No space left on device" in r.getMessage()]) == 1
    _assert_same(open_store(place), store)
    filler.unlink()
    assert opened.fetch("train", opened.spans("train", _blocks(4, 3), LENGTH))
    proxy.forget()
    assert (_rows(opened, _blocks(4, 3)) == _rows(store, _blocks(4, 3))).all()
    assert proxy.requests["GET"] == 0


READER = """
import sys
import numpy as np
from orchestrator.data import token_blocks
from orchestrator.data.bucket_store import open_store
from orchestrator.data.store import TokenStore
from orchestrator.storage.backends.location import location_of

token_blocks.OTHER_S = 100.0  # another one may be held up for long
place, original, seed, at_once = sys.argv[1:]
store, opened = TokenStore.open(original), open_store(location_of(place))
random = np.random.default_rng(int(seed))
print("open", flush=True)
for _ in range(80):
    rows = random.integers(0, store.num_rows("train", 64), int(at_once))
    found, wanted = (s.rows("train", rows, 64) for s in (opened, store))
    assert (found.inputs_RT == wanted.inputs_RT).all() and (found.targets_RT == wanted.targets_RT).all()
print("same", flush=True)
"""


def _reader(place: BucketUrl, store: TokenStore, seed: int, at_once: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", READER, str(place), str(store.directory), str(seed), str(at_once)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _await(reader: "subprocess.Popen[str]", line: str) -> None:
    assert reader.stdout is not None and reader.stdout.readline() == f"{line}\n"


def test_processes_share_what_one_of_them_has_fetched(store: TokenStore, place: BucketUrl, proxy: RequestProxy) -> None:
    open_store(place)
    proxy.forget()
    with _reader(place, store, 1, at_once=1) as one, _reader(place, store, 2, at_once=1) as other:
        for reader in (one, other):
            _await(reader, "open")
            _await(reader, "same")
    assert proxy.requests["GET"] == 16


@pytest.mark.parametrize("seed", range(4))
def test_a_process_that_is_killed_leaves_no_wrong_block(store: TokenStore, place: BucketUrl, seed: int) -> None:
    random = np.random.default_rng(seed)
    with _reader(place, store, seed, at_once=4) as victim, _reader(place, store, seed + 50, at_once=4) as other:
        _await(victim, "open")
        threading.Event().wait(float(random.random() * 0.1))
        os.kill(victim.pid, signal.SIGKILL)
        _await(other, "open")
        _await(other, "same")
    _assert_same(open_store(place), store)


def test_a_stopped_process_does_not_keep_others_from_blocks_that_it_fetches(
    store: TokenStore, place: BucketUrl, proxy: RequestProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.data.token_blocks.OTHER_S", 0.2)
    opened = open_store(place)
    locker = (
        "import fcntl, sys, time\n"
        "file = open(sys.argv[1], 'r+b')\n"
        "fcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\n"
        "time.sleep(600)"
    )
    command = [sys.executable, "-c", locker, str(opened.directory / "train.blocks")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        _await(other, "locked")
        assert (_rows(opened, _blocks(2)) == _rows(store, _blocks(2))).all()
        other.kill()
