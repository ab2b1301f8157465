"""Preparation of a run whose storage is a bucket; one in a directory is in `tests/integration/test_prepare.py`."""

from pathlib import Path

import pytest

from orchestrator.data.bucket_store import node_stores, open_store
from orchestrator.data.manifest import TOKENIZER
from orchestrator.data.tokenizer import TextTokenizer
from orchestrator.run_records.data_preparation import Preparation
from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.bucket_url import BucketUrl
from orchestrator.storage.backends.location import location_of, objects_at
from tests.support.buckets import s3_bucket


def test_the_store_and_the_tokenizer_of_a_run_in_a_bucket_are_there_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path / "head"))
    (tmp_path / "texts").mkdir()
    for number in range(20):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"text {number} of a corpus\n" * 200)
    data = {"source": str(tmp_path / "texts"), "vocab_size": 300, "holdout": 0.2}
    job = JobSpec.model_validate({"schema": "v1", "name": "demo", "data": data})
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
