import json
from pathlib import Path

import pytest

from orchestrator.client import check_job
from orchestrator.errors import DataError, NameTaken, UsageError
from orchestrator.spec.job import JobSpec


def test_paths_of_a_job_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "one.txt").touch()
    (tmp_path / "job.yaml").write_text("{schema: v1, name: try, storage: ./store, data: {source: books}}")
    job = check_job("job.yaml")
    assert (job.storage, job.data.source) == (str(tmp_path / "store"), str(tmp_path / "books"))
    assert not (tmp_path / "store").exists()


def test_what_passes_to_the_cluster_reads_as_the_same_job(tmp_path: Path) -> None:
    job = check_job(JobSpec.model_validate({"schema": "v1", "name": "try", "storage": str(tmp_path)}))
    assert JobSpec.model_validate(json.loads(job.model_dump_json(by_alias=True))) == job
    assert job.data.source == "builtin:stdlib"


def test_a_directory_with_something_in_it_is_not_taken_over(tmp_path: Path) -> None:
    job = JobSpec.model_validate({"schema": "v1", "name": "try", "storage": str(tmp_path)})
    (tmp_path / "try").mkdir()
    assert check_job(job).name == "try"  # an empty one holds no run
    (tmp_path / "try" / "precious").touch()
    with pytest.raises(NameTaken, match="exists already"):
        check_job(job)


@pytest.mark.parametrize(
    ("source", "cause"),
    [("/nowhere/at/all", "does not exist"), ("empty", "holds no file of .txt"), ("book.pdf", "is none of .txt")],
)
def test_a_missing_corpus_is_an_early_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, cause: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").touch()
    (tmp_path / "book.pdf").touch()
    with pytest.raises(DataError, match=cause):
        check_job(JobSpec.model_validate({"schema": "v1", "name": "try", "data": {"source": source}}))
    assert not (tmp_path / "runs").exists()


def test_another_name_takes_the_jobs_place(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(f"schema: v1\nname: first\nstorage: {tmp_path}\n")
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "job.json").write_text("{}")
    with pytest.raises(NameTaken):
        check_job(job)
    assert check_job(job, "second").name == "second"


def test_another_name_is_checked_like_the_jobs(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(f"schema: v1\nname: first\nstorage: {tmp_path}\n")
    with pytest.raises(UsageError, match="Not A Name"):
        check_job(job, "Not A Name")
