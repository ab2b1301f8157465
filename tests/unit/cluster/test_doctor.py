"""Each finding, on a machine made sick on purpose."""

import importlib.metadata
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.cluster import doctor
from orchestrator.cluster.doctor import Finding, Verdict, examine
from orchestrator.storage.backends.bucket_url import BucketUrl
from orchestrator.storage.backends.location import Location
from tests.support.buckets import s3_bucket
from tests.support.request_proxy import RequestFault


@pytest.fixture(autouse=True)
def well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(doctor, "LEFT_BY_RAY", tmp_path / "ray_current_cluster")


@pytest.fixture
def dead_address() -> Iterator[str]:
    """An address at which no process listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"


def _of(subject: str, storage: Location) -> Finding:
    return {finding.subject: finding for finding in examine(storage)}[subject]


def test_a_machine_that_is_well_has_no_fault(tmp_path: Path) -> None:
    found = list(examine(tmp_path / "not" / "yet" / "there"))
    assert [f.text for f in found if f.verdict is Verdict.FAULT] == []
    assert len({f.subject for f in found}) == len(found) == 6
    assert not (tmp_path / "not").exists()


def test_a_package_out_of_range_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0" if name == "torch" else real(name))
    found = _of("packages", tmp_path)
    assert found.verdict is Verdict.FAULT and "torch is 1.0, needed is" in found.text


def test_a_bucket_is_checked() -> None:
    with s3_bucket() as (url, proxy):
        good = _of("storage", BucketUrl(f"{url}/doctor"))
        assert good.verdict is Verdict.OK and good.text.startswith(f"{url}/doctor: objects are created once")
        with proxy.failing("PUT", RequestFault.FORBIDDEN):
            refused = _of("storage", BucketUrl(f"{url}/doctor"))
        assert refused.verdict is Verdict.FAULT and "403 Forbidden" in refused.text
        assert "AWS_SECRET_ACCESS_KEY" in refused.remedy
        absent = _of("storage", BucketUrl("s3://absent/doctor"))
        assert absent.verdict is Verdict.FAULT and "there is no such bucket" in absent.text


def test_storage_that_is_a_file_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    found = _of("storage", tmp_path / "runs")
    assert found.verdict is Verdict.FAULT and found.remedy


def test_an_address_without_an_answer_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dead_address: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", dead_address)
    found = _of("cluster", tmp_path)
    assert found.verdict is Verdict.FAULT and dead_address in found.text and "RAY_ADDRESS" in found.remedy


def test_a_stale_file_of_ray_is_a_warning(tmp_path: Path, dead_address: str) -> None:
    (tmp_path / "ray_current_cluster").write_text(dead_address)
    found = _of("leftovers", tmp_path)
    assert found.verdict is Verdict.WARNING and "Remove the file" in found.remedy
