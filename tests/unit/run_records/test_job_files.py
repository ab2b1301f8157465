"""A run's job, stored once, in a directory and in a bucket."""

from itertools import count
from pathlib import Path

import pytest

from orchestrator.errors import NameTaken, NotAllowed, NotFound, StorageError, UsageError
from orchestrator.run_records.job_files import has_job, read_job, remove_job, write_job
from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.bucket_url import BucketUrl
from orchestrator.storage.backends.location import Location, objects_at
from orchestrator.storage.backends.probe import check_storage
from orchestrator.storage.journal import Journal
from tests.support.request_proxy import RequestFault, RequestProxy

JOB = JobSpec.model_validate({"schema": "v1", "name": "demo"})
JSON = JOB.model_dump_json(by_alias=True)
number = count()


@pytest.fixture(params=["directory", "bucket"])
def location(request: pytest.FixtureRequest, tmp_path: Path, bucket: tuple[str, RequestProxy]) -> Location:
    bucket[1].forget()
    if request.param == "directory":
        (tmp_path / "runs").mkdir()
        return tmp_path / "runs" / "demo"
    return BucketUrl(bucket[0]) / f"job-files-{next(number)}" / "demo"


def test_a_job_is_read_as_it_was_written(location: Location) -> None:
    assert not has_job(location)
    write_job(location, JSON, "name: demo\n")
    assert has_job(location) and read_job(location) == JOB
    assert objects_at(location).get("job.yaml") == b"name: demo\n"
    assert objects_at(location).names("") == ("job.json", "job.yaml")


def test_code_is_stored_with_a_job_and_removed_with_it(location: Location) -> None:
    digest = "0" * 64
    job_json = JOB.model_copy(update={"code": {"/mine": digest}}).model_dump_json(by_alias=True)
    write_job(location, job_json, "name: demo\n", {digest: b"packed"})
    assert objects_at(location).get(f"code-{digest}.tar") == b"packed"
    remove_job(location, job_json)
    assert objects_at(location).objects("") == ()


def test_a_location_without_a_job_holds_no_run(location: Location) -> None:
    with pytest.raises(NotFound, match=f"{location} holds no run"):
        read_job(location)


def test_another_job_of_the_name_is_refused(location: Location) -> None:
    write_job(location, JSON, "name: demo\n")
    with pytest.raises(NameTaken, match="holds a run demo"):
        write_job(location, JSON.replace("demo", "other"), "name: other\n")
    assert read_job(location) == JOB and objects_at(location).get("job.yaml") == b"name: demo\n"


def test_a_text_that_was_left_behind_is_replaced(location: Location) -> None:
    check_storage(location)  # makes a directory
    objects_at(location).create("job.yaml", b"name: cut off\n")
    write_job(location, JSON, "name: demo\n")
    assert objects_at(location).get("job.yaml") == b"name: demo\n"


def test_a_job_that_was_removed_leaves_nothing(location: Location) -> None:
    write_job(location, JSON, "name: demo\n")
    remove_job(location, JSON.replace("demo", "other"))
    assert read_job(location) == JOB
    Journal(objects_at(location))
    remove_job(location, JSON)
    assert read_job(location) == JOB
    objects_at(location).delete(["journal/0000000000"])
    if isinstance(location, Path):
        (location / "journal").rmdir()
    remove_job(location, JSON)
    assert objects_at(location).objects("") == () and not has_job(location)
    if isinstance(location, Path):
        assert not location.exists()
    remove_job(location, JSON)


def test_a_submission_that_fails_leaves_the_job_of_another_one(bucket: tuple[str, RequestProxy]) -> None:
    location = BucketUrl(bucket[0]) / "contested" / "demo"
    write_job(location, JSON, "name: demo\n")
    bucket[1].forget()
    with bucket[1].failing("PUT", RequestFault.FORBIDDEN), pytest.raises(NotAllowed):
        write_job(location, JSON.replace("demo", "other"), "name: other\n")
    assert read_job(location) == JOB


def test_a_job_that_can_not_be_read_is_named(location: Location) -> None:
    check_storage(location)  # makes a directory
    objects_at(location).create("job.json", b"{")
    with pytest.raises(UsageError, match=f"{location}/job.json can't be read"):
        read_job(location)


def test_storage_that_refuses_has_nothing_of_the_job(bucket: tuple[str, RequestProxy]) -> None:
    location = BucketUrl(bucket[0]) / "refused" / "demo"
    bucket[1].forget()
    with bucket[1].failing("PUT", RequestFault.FORBIDDEN), pytest.raises(NotAllowed, match="AWS_SECRET_ACCESS_KEY"):
        write_job(location, JSON, "name: demo\n")
    with bucket[1].failing("PUT", RequestFault.UNAVAILABLE), pytest.raises(StorageError, match="503"):
        write_job(location, JSON, "name: demo\n")
    assert objects_at(location).objects("") == ()


def test_a_file_where_the_directory_should_be_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("")
    assert not has_job(tmp_path / "demo")
    with pytest.raises(StorageError, match="can't be written"):
        write_job(tmp_path / "demo", JSON, "")
