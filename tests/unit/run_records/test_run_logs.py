"""Log lines of a run in a bucket; those in files are in `test_run_files`."""

from collections.abc import Iterator

import pytest

from orchestrator.errors import NotFound
from orchestrator.run_records.run_files import RunFiles
from orchestrator.storage.backends.bucket_url import BucketUrl
from orchestrator.storage.backends.location import objects_at
from orchestrator.storage.objects import Objects
from tests.support.buckets import s3_bucket


@pytest.fixture(scope="module")
def run() -> Iterator[BucketUrl]:
    with s3_bucket() as (url, _):
        yield BucketUrl(f"{url}/logged")


def part(objects: Objects, source: str, number: int, *texts: str) -> None:
    lines = "".join(f"2026-01-01 10:00:0{text[0]},000 INFO {text[1:]}\n" for text in texts)
    objects.create(f"logs/{source}/{number:020d}-ab", lines.encode())


def test_lines_of_objects_are_merged_and_read_once(run: BucketUrl) -> None:
    objects = objects_at(run)
    objects.create("job.json", b"{}")
    part(objects, "w0", 1, "1 one", "4 four\nTraceback:\n  more")
    part(objects, "w1", 2, "2 two")
    part(objects, "w0", 3, "5 five")
    looks = iter([False, True])

    def is_over() -> bool:
        over = next(looks)
        if over:
            part(objects, "w1", 4, "6 six")
            part(objects, "w0", 2, "7 came late")
        return over

    lines = [(line.source, line.text) for line in RunFiles(run).logs(is_over)]
    assert lines == [
        ("w0", "INFO  one"),
        ("w1", "INFO  two"),
        ("w0", "INFO  four\nTraceback:\n  more"),
        ("w0", "INFO  five"),
        ("w1", "INFO  six"),
        ("w0", "INFO  came late"),
    ]
    assert [line.text for line in RunFiles(run).logs(source="w1", tail=1)] == ["INFO  six"]
    with pytest.raises(NotFound, match=r"no log of 'w7'.*logs of w0, w1"):
        list(RunFiles(run).logs(source="w7"))
