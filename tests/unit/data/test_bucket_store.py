"""Token stores in a bucket, and what nodes hold of them. Their tokens: `test_token_blocks`."""

import threading
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from orchestrator.data import bucket_store
from orchestrator.data.bucket_store import NOT_COPIED, node_stores, open_store, upload
from orchestrator.data.manifest import is_store
from orchestrator.data.store import TokenStore
from orchestrator.errors import DataError, StoreCorrupt
from orchestrator.storage.backends.bucket_url import BucketUrl
from orchestrator.storage.backends.location import objects_at
from tests.support.request_proxy import RequestFault, RequestProxy
from tests.unit.data.stores import write_store

number = count()


@pytest.fixture
def place(bucket: tuple[str, RequestProxy]) -> BucketUrl:
    bucket[1].forget()
    return BucketUrl(bucket[0]) / ".data" / f"store{next(number)}"


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(bucket_store, "READ_BYTES", 1_000)


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return write_store(tmp_path / "original", [40] * 60)


def test_a_store_in_a_bucket_is_the_one_that_was_put_there(store: TokenStore, place: BucketUrl) -> None:
    upload(store.directory, store.manifest.files, place)
    opened = open_store(place)
    assert opened.directory == node_stores() / place.name and opened.digest == store.digest
    rows = np.arange(10)
    assert (opened.rows("train", rows, 16).inputs_RT == store.rows("train", rows, 16).inputs_RT).all()
    assert (opened.index("train")["offset"] == store.index("train")["offset"]).all()
    assert opened.num_rows("validation", 4) == store.num_rows("validation", 4)
    assert opened.tokenizer().digest == store.tokenizer().digest
    assert not opened.is_local
    there = open_store(store.directory)
    assert there.directory == store.directory and there.is_local  # one in a directory stays there


def test_the_files_on_a_node_are_no_store_of_their_own(store: TokenStore, place: BucketUrl) -> None:
    """Their tokens are full of holes."""
    upload(store.directory, store.manifest.files, place)
    opened = open_store(place)
    opened.rows("train", np.arange(10), 16)
    with pytest.raises(StoreCorrupt, match=r"documents\.jsonl can't be read"):
        TokenStore.open(opened.directory)
    assert not is_store(opened.directory)


def test_small_files_are_copied_once_by_a_nodes_workers_and_no_tokens(
    store: TokenStore, place: BucketUrl, bucket: tuple[str, RequestProxy]
) -> None:
    upload(store.directory, store.manifest.files, place)
    opened: list[str] = []
    bucket[1].forget()
    threads = [threading.Thread(target=lambda: opened.append(open_store(place).digest)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opened == [store.digest] * 4
    small = [recorded for name, recorded in store.manifest.files.items() if name not in NOT_COPIED]
    assert len(small) == 5
    assert bucket[1].requests["GET"] == sum(-(-recorded.num_bytes // 1_000) for recorded in small) + 1


def test_an_upload_that_is_cut_off_is_continued(
    store: TokenStore, place: BucketUrl, bucket: tuple[str, RequestProxy]
) -> None:
    bucket[1].fail("PUT", None, None, RequestFault.FORBIDDEN)
    with pytest.raises(PermissionError):
        upload(store.directory, store.manifest.files, place)
    with pytest.raises(DataError, match=f"{place} is no store of data"):
        open_store(place)
    bucket[1].forget()
    upload(store.directory, store.manifest.files, place)
    assert len(bucket[1].paths["PUT"]) == len(store.manifest.files) - 2 + 1  # the other files, and the manifest
    assert open_store(place).digest == store.digest


def test_files_that_are_cut_off_or_damaged_do_not_appear(
    store: TokenStore, place: BucketUrl, bucket: tuple[str, RequestProxy]
) -> None:
    upload(store.directory, store.manifest.files, place)
    bucket[1].fail("GET", None, None, None, RequestFault.FORBIDDEN)
    with pytest.raises(PermissionError):
        open_store(place)
    objects = objects_at(place)
    index = objects.get("train.index.npy")
    objects.delete(["train.index.npy"])
    objects.create("train.index.npy", index[:-1] + bytes([index[-1] ^ 1]))
    with pytest.raises(StoreCorrupt, match=f"{place}/train.index.npy has sha256") as raised:
        open_store(place)
    assert f"Delete {place}/train.index.npy" in raised.value.remedy
    assert [path.name for path in node_stores().iterdir()] == [f".{place.name}.lock"]
    objects.delete(["train.index.npy"])
    upload(store.directory, store.manifest.files, place)
    assert open_store(place).digest == store.digest


def test_damaged_digests_on_a_node_are_found(store: TokenStore, place: BucketUrl) -> None:
    """Else good blocks would count as damaged."""
    upload(store.directory, store.manifest.files, place)
    path = open_store(place).directory / "train.digests"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(StoreCorrupt, match=r"train\.digests has sha256"):
        open_store(place)


def test_what_is_no_store_is_refused(place: BucketUrl) -> None:
    with pytest.raises(DataError, match=f"{place} is no store of data: it holds no manifest.json"):
        open_store(place)
