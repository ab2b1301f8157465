import logging
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.storage.backends.bucket_url import BucketUrl
from orchestrator.storage.backends.location import Location, objects_at
from orchestrator.storage.backends.log_target import LogTarget
from orchestrator.storage.log_file import flush_logs
from tests.support.buckets import s3_bucket


@pytest.fixture(params=["directory", "bucket"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Location]:
    if request.param == "directory":
        yield tmp_path
    else:
        with s3_bucket() as (url, _):
            yield BucketUrl(f"{url}/log-target")


def test_lines_of_a_process_are_with_its_run(run: Location) -> None:
    before = list(logging.getLogger("orchestrator").handlers)
    pickle.loads(pickle.dumps(LogTarget(run, "w0"))).open()
    try:
        logging.getLogger("orchestrator.test").info("ready")
        flush_logs(30.0)
    finally:
        logging.getLogger("orchestrator").handlers[:] = before
    (found,) = objects_at(run).objects("logs")
    assert objects_at(run).get(found.key).endswith(b"INFO orchestrator.test ready\n")
    assert found.key == "logs/w0.log" or found.key.startswith("logs/w0/")
