"""Token stores in a bucket, and their copies on nodes."""

import threading
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from orchestrator.data import store_copy
from orchestrator.data.store import TokenStore
from orchestrator.data.store_copy import node_stores, open_store, upload
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
    monkeypatch.setattr(store_copy, "BLOCK_BYTES", 1_000)


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return write_store(tmp_path / "original", [40] * 60)


def test_a_copy_is_the_store(store: TokenStore, place: BucketUrl) -> None:
    upload(store, place)
    copy = open_store(place)
    assert copy.directory == node_stores() / place.name and copy.digest == store.digest
    rows = np.arange(10)
    assert (copy.rows("train", rows, 16).inputs_RT == store.rows("train", rows, 16).inputs_RT).all()
    assert copy.tokenizer().digest == store.tokenizer().digest
    assert open_store(store.directory).directory == store.directory  # one in a directory stays there


def test_a_store_is_copied_once_by_a_nodes_workers(
    store: TokenStore, place: BucketUrl, bucket: tuple[str, RequestProxy]
) -> None:
    upload(store, place)
    opened: list[str] = []
    bucket[1].forget()
    threads = [threading.Thread(target=lambda: opened.append(open_store(place).digest)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opened == [store.digest] * 4
    num_blocks = sum(-(-recorded.num_bytes // 1_000) for recorded in store.manifest.files.values())
    assert bucket[1].requests["GET"] == num_blocks + 1


def test_an_upload_that_is_cut_off_goes_on(
    store: TokenStore, place: BucketUrl, bucket: tuple[str, RequestProxy]
) -> None:
    bucket[1].fail("PUT", None, None, RequestFault.FORBIDDEN)
    with pytest.raises(PermissionError):
        upload(store, place)
    with pytest.raises(DataError, match=f"{place} is no token store"):
        open_store(place)
    bucket[1].forget()
    upload(store, place)
    assert bucket[1].requests["PUT"] == len(store.manifest.files) - 2 + 1  # the other files, and the manifest
    assert open_store(place).digest == store.digest


def test_a_copy_that_is_cut_off_or_damaged_does_not_appear(
    store: TokenStore, place: BucketUrl, bucket: tuple[str, RequestProxy]
) -> None:
    upload(store, place)
    bucket[1].fail("GET", None, None, None, RequestFault.FORBIDDEN)
    with pytest.raises(PermissionError):
        open_store(place)
    objects = objects_at(place)
    tokens = objects.get("train.tokens")
    objects.delete(["train.tokens"])
    objects.create("train.tokens", tokens[:-1] + bytes([tokens[-1] ^ 1]))
    with pytest.raises(StoreCorrupt, match=r"train\.tokens"):
        open_store(place)
    assert [path.name for path in node_stores().iterdir()] == [f".{place.name}.lock"]
    objects.delete(["train.tokens"])
    objects.create("train.tokens", tokens)
    assert open_store(place).digest == store.digest


def test_what_is_no_store_is_refused(place: BucketUrl) -> None:
    with pytest.raises(DataError, match=f"{place} is no token store: it holds no manifest.json"):
        open_store(place)
