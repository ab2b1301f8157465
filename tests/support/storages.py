"""Storage of every kind, empty, for tests of what all of them must do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest

from orchestrator.storage.backends.bucket_objects import BucketObjects
from orchestrator.storage.directory import DirectoryObjects
from orchestrator.storage.objects import LargeObjects
from tests.support.buckets import azure_bucket, ceph_bucket, gcs_bucket, s3_bucket
from tests.support.disk import ext4_disk, small_disk
from tests.support.fuse_disk import fuse_disk

CEPH = pytest.param("ceph", marks=pytest.mark.slow)  # which takes 15 s to start
KINDS = ("directory", "tmpfs", "ext4", "fuse", "s3", "gs", "az", CEPH)

number = count()  # moto's servers in one process share their buckets

MakeStorage = Callable[[], LargeObjects]


@contextmanager
def storage_of(kind: str, place: Path) -> Iterator[MakeStorage]:
    """A function that makes empty storage of a kind, at `place`, which doesn't exist yet, if it is a file system. Skips
    the test where there is none."""
    match kind:
        case "directory":
            yield lambda: _new_directory(place)
        case "tmpfs":
            with small_disk(place, 256):
                yield lambda: _new_directory(place)
        case "ext4":
            with ext4_disk(place, 256):
                yield lambda: _new_directory(place)
        case "fuse":
            with fuse_disk(place, 256) as disk:
                yield lambda: _new_directory(disk.path)
        case "s3":
            with s3_bucket() as (url, _):
                yield lambda: BucketObjects(f"{url}/in s3/{next(number)}")
        case "gs":
            with gcs_bucket() as url:
                yield lambda: BucketObjects(f"{url}/runs/{next(number)}")
        case "ceph":
            with ceph_bucket() as url:
                yield lambda: BucketObjects(f"{url}/runs/{next(number)}")
        case _:
            with azure_bucket() as url:
                yield lambda: BucketObjects(f"{url}/runs/{next(number)}")


def _new_directory(place: Path) -> LargeObjects:
    directory = place / str(next(number))
    directory.mkdir(parents=True)
    return DirectoryObjects(directory)
