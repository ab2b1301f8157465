from pathlib import Path

import pytest

from orchestrator.errors import UsageError
from orchestrator.storage.backends.bucket_objects import BucketObjects
from orchestrator.storage.backends.bucket_url import BucketUrl
from orchestrator.storage.backends.location import location_of, objects_at
from orchestrator.storage.directory import DirectoryObjects


def test_a_path_is_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert location_of("runs") == location_of("./runs") == tmp_path / "runs"
    assert location_of("~/runs") == Path.home() / "runs"
    assert isinstance(objects_at(location_of("/runs")), DirectoryObjects)


@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
def test_a_url_is_a_bucket(scheme: str) -> None:
    location = location_of(f"{scheme}://bucket/team/runs/")
    assert location == BucketUrl(f"{scheme}://bucket/team/runs") and isinstance(objects_at(location), BucketObjects)
    assert str(location / "demo") == f"{scheme}://bucket/team/runs/demo"
    assert (location / "demo").name == "demo" and (location / "demo").parent == location
    assert location_of(f"{scheme}://bucket") == location.parent.parent == location.parent.parent.parent


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hdfs://host/runs", "hdfs:// is none of s3://, gs:// and az://. Name a directory that all nodes share"),
        ("s3a://bucket/runs", "s3a:// is none of s3://, gs:// and az://. Did you mean `s3`?"),
        ("S3://bucket", "S3:// is none of"),
        ("file:///runs", "file:// is none of"),
        ("s3:/bucket/runs", "a bucket's URL begins with s3://"),
        ("gs:bucket", "a bucket's URL begins with gs://"),
        ("s3://", "a URL is s3://BUCKET or s3://BUCKET/PATH"),
        ("s3:///runs", "a URL is s3://BUCKET or s3://BUCKET/PATH"),
        ("gs://bucket//runs", "without names that are empty"),
        ("s3://bucket/../runs", "without names that are empty, . or .."),
        ("s3://bucket/a%20b", "spaces, ?, # or %"),
        ("az://bucket/runs?sig=1", "without names that are empty, . or .., and without spaces, ?, # or %"),
    ],
)
def test_what_is_no_storage_is_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError) as raised:
        location_of(text)
    assert words in str(raised.value) and text in str(raised.value)
    assert raised.value.unchanged == "Nothing was started."
