"""Ends of a run, in a directory and in a bucket."""

from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from orchestrator.errors import NotFound
from orchestrator.protocol.status import RunPhase
from orchestrator.run_records.final_status import has_ended, note_resumed, read_status, status_key
from orchestrator.run_records.status import to_json
from orchestrator.storage.backends.bucket_url import BucketUrl
from orchestrator.storage.backends.location import Location, objects_at
from tests.support.request_proxy import RequestProxy
from tests.unit.cli.statuses import status

number = count()


@pytest.fixture(params=["directory", "bucket"])
def location(request: pytest.FixtureRequest, tmp_path: Path, bucket: tuple[str, RequestProxy]) -> Location:
    (tmp_path / "demo").mkdir()
    return tmp_path / "demo" if request.param == "directory" else BucketUrl(bucket[0]) / f"ends-{next(number)}" / "demo"


def test_a_run_that_has_not_ended_has_no_final_status(location: Location) -> None:
    objects_at(location).create("journal/0000000000", b"{}")
    assert not has_ended(location)
    with pytest.raises(NotFound, match="no run has ended there"):
        read_status(location)


def test_the_newest_end_counts(location: Location) -> None:
    for term, phase in ((2, RunPhase.PAUSED), (10, RunPhase.SUCCEEDED)):
        objects_at(location).create(status_key(term), to_json(replace(status(), phase=phase)).encode())
        assert has_ended(location) and read_status(location).phase is phase


def test_a_run_that_was_resumed_has_not_ended(location: Location) -> None:
    """Also if the controller of before has written its status only afterwards."""
    objects = objects_at(location)
    objects.create(status_key(1), to_json(status()).encode())
    for _ in range(2):
        note_resumed(objects, 3)
    assert not has_ended(location)
    objects.create(status_key(2), to_json(status()).encode())
    assert not has_ended(location)
    with pytest.raises(NotFound, match="since the run was begun or resumed"):
        read_status(location)
    for term in (3, 10):  # the controller may have been restarted
        objects.create(status_key(term), to_json(status()).encode())
        assert has_ended(location)
