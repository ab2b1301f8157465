"""Preparation of a run whose storage is a bucket or refuses writes; `tests/integration/test_prepare.py` has more."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from orchestrator.data.bucket_store import node_stores, open_store
from orchestrator.data.manifest import TOKENIZER
from orchestrator.data.store import TokenStore
from orchestrator.data.tokenizer import TextTokenizer
from orchestrator.run_records.data_preparation import Preparation
from orchestrator.run_records.prepared_data import PreparedData
from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.bucket_url import BucketUrl
from orchestrator.storage.backends.location import location_of, objects_at
from orchestrator.storage.condition import StorageCondition
from tests.support.buckets import s3_bucket
from tests.support.disk import fill, read_only, small_disk, unmounted

PATIENCE_S = 60.0


def _job(texts: Path, num_texts: int = 20, **data: object) -> JobSpec:
    texts.mkdir()
    for number in range(num_texts):
        (texts / f"{number}.txt").write_text(f"text {number} of a corpus\n" * 200)
    of_texts = {"source": str(texts), "vocab_size": 300, "holdout": 0.2, **data}
    return JobSpec.model_validate({"schema": "v1", "name": "demo", "data": of_texts})


def test_the_store_and_the_tokenizer_of_a_run_in_a_bucket_are_there_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path / "head"))
    job = _job(tmp_path / "texts")
    with s3_bucket() as (url, _):
        storage = BucketUrl(f"{url}/prepared")
        found = Preparation().prepare(job.model_dump_json(by_alias=True), str(storage / "demo"), str(storage / ".data"))
        again = Preparation().prepare(job.model_dump_json(by_alias=True), str(storage / "demo"), str(storage / ".data"))
        assert again == found and found.store_dir.startswith(f"{storage}/.data/")
        saved = objects_at(storage / "demo").get(TOKENIZER)
        assert found.tokenizer == f"{storage}/demo/{TOKENIZER}"
        monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path / "another node"))
        store = open_store(location_of(found.store_dir))
        assert store.directory.is_relative_to(node_stores()) and store.vocab_size == found.vocab_size
        assert store.tokenizer().digest == TextTokenizer(saved).digest


@contextmanager
def _full(disk: Path, leave: int = 0) -> Iterator[None]:
    filler = fill(disk, leave)
    try:
        yield
    finally:
        filler.unlink()


def _nearly_full(disk: Path) -> AbstractContextManager[None]:
    return _full(disk, leave=200_000)  # the store needs twice that


@pytest.mark.parametrize(
    ("refusing", "condition"),
    [
        (_full, StorageCondition.FULL),
        (_nearly_full, StorageCondition.FULL),
        (read_only, StorageCondition.READ_ONLY),
        (unmounted, StorageCondition.AWAY),
    ],
)
def test_preparation_waits_while_storage_refuses_its_data(
    tmp_path: Path, refusing: Callable[[Path], AbstractContextManager[None]], condition: StorageCondition
) -> None:
    job = _job(tmp_path / "texts", num_texts=100).model_dump_json(by_alias=True)
    (tmp_path / "calm" / "demo").mkdir(parents=True)
    calm = Preparation().prepare(job, str(tmp_path / "calm" / "demo"), str(tmp_path / "calm" / ".data"))
    preparation, prepared = Preparation(), Future[PreparedData]()
    with small_disk(tmp_path / "disk", 24) as disk:
        (disk / "demo").mkdir()

        def prepare() -> None:
            prepared.set_result(preparation.prepare(job, str(disk / "demo"), str(disk / ".data")))

        with refusing(disk):
            threading.Thread(target=prepare, daemon=True).start()
            _until(lambda: preparation.progress().trouble is not None)
            trouble = preparation.progress().trouble
            assert trouble is not None and trouble.condition is condition, trouble
            assert "prepared data can't be written: " in trouble.why
            assert not list(disk.glob(".data/store-*")) and not (disk / "demo" / TOKENIZER).exists()
        found = prepared.result(PATIENCE_S)
        assert preparation.progress().trouble is None
        store, expected = TokenStore.open(found.store_dir, verify=True), TokenStore.open(calm.store_dir)
        assert store.digest == expected.digest and Path(found.tokenizer).exists()
        assert [path.name for path in (disk / ".data").iterdir()] == [store.directory.name]


def _until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, "it never came true"
        time.sleep(0.02)
