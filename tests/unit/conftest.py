"""Fixtures of unit tests."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.support.fuse_disk import FuseDisk, fuse_disk

if TYPE_CHECKING:
    from tests.support.request_proxy import RequestProxy


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """The device that holds this process's tensors."""
    from tests.support import devices

    devices.use(request.param)
    return str(request.param)


@pytest.fixture(scope="module")
def bucket() -> "Iterator[tuple[str, RequestProxy]]":
    """URL of a bucket on S3, and the proxy before its server."""
    from tests.support.buckets import s3_bucket  # loads a server, which few tests need

    with s3_bucket() as found:
        yield found


@pytest.fixture(scope="module")
def fuse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FuseDisk]:
    """A file system whose calls may have faults."""
    with fuse_disk(tmp_path_factory.mktemp("fuse") / "disk", 64) as disk:
        yield disk


@pytest.fixture
def proxy(bucket: "tuple[str, RequestProxy]") -> "RequestProxy":
    """That proxy, without faults."""
    bucket[1].forget()
    return bucket[1]
