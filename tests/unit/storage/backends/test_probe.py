import errno
import os
import time
from pathlib import Path

import pytest

from orchestrator.errors import NotAllowed, StorageError, UsageError
from orchestrator.storage.backends.bucket_url import BucketUrl
from orchestrator.storage.backends.location import objects_at
from orchestrator.storage.backends.probe import access_error, check_storage, refusal_at
from orchestrator.storage.guard import StorageGuard
from tests.support.buckets import azure_bucket, environment, iam_bucket, s3_variables
from tests.support.request_proxy import RequestFault, RequestProxy


def place(bucket: tuple[str, RequestProxy], name: str) -> BucketUrl:
    """A location of its own, because a process keeps the client of each."""
    bucket[1].forget()
    return BucketUrl(bucket[0]) / name


def test_good_storage_is_left_as_it_was(bucket: tuple[str, RequestProxy], tmp_path: Path) -> None:
    for location in (place(bucket, "good"), tmp_path / "good"):
        check_storage(location)
        assert objects_at(location).objects("") == ()


def test_a_bucket_that_ignores_conditions_is_refused(bucket: tuple[str, RequestProxy]) -> None:
    location = place(bucket, "unconditional")
    bucket[1].ignores_conditions = True
    try:
        with pytest.raises(UsageError, match=f"{location} overwrites an object whose name is taken") as raised:
            check_storage(location)
    finally:
        bucket[1].ignores_conditions = False
    assert "conditional writes" in raised.value.remedy and raised.value.unchanged == "Nothing was started."
    assert objects_at(location).objects("") == ()


def test_a_bucket_that_knows_no_conditions_is_refused(bucket: tuple[str, RequestProxy]) -> None:
    location = place(bucket, "unknown")
    bucket[1].fail("PUT", RequestFault.NOT_IMPLEMENTED)
    with pytest.raises(UsageError, match="can't create an object only if its name is free"):
        check_storage(location)


def test_a_file_system_without_hard_links_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: object, target: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted", str(source), None, str(target))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(UsageError, match="without hard links"):
        check_storage(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("method", ["PUT", "GET", "POST"], ids=["write", "read", "delete"])
def test_a_missing_permission_is_named(bucket: tuple[str, RequestProxy], method: str) -> None:
    location = place(bucket, f"forbidden {method}")
    with bucket[1].failing(method, RequestFault.FORBIDDEN), pytest.raises(NotAllowed) as raised:
        check_storage(location)
    assert raised.value.exit_code == 77
    assert str(raised.value).startswith(
        f"{location} can't be used: 403 Forbidden (AccessDenied). Set AWS_ACCESS_KEY_ID"
    )
    assert "read, write, list and delete" in raised.value.remedy and raised.value.unchanged == "Nothing was started."


def test_wrong_credentials_are_refused() -> None:
    """By a server that checks keys and signatures."""
    codes = {"AWS_ACCESS_KEY_ID": "InvalidAccessKeyId", "AWS_SECRET_ACCESS_KEY": "SignatureDoesNotMatch"}
    with iam_bucket() as url:
        check_storage(BucketUrl(f"{url}/right"))
        for name, code in codes.items():
            refused = pytest.raises(NotAllowed, match=rf"403 Forbidden \({code}\)")
            with environment(**{name: "wrong"}), refused as raised:
                check_storage(BucketUrl(f"{url}/{name}"))
            assert name in raised.value.remedy


@pytest.mark.parametrize("missing", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_a_missing_variable_is_named(
    bucket: tuple[str, RequestProxy], monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.delenv(missing)
    with pytest.raises(NotAllowed, match=f"no credentials were found: {missing} is not set"):
        check_storage(place(bucket, f"without {missing}"))


def test_no_credentials_at_all(bucket: tuple[str, RequestProxy], monkeypatch: pytest.MonkeyPatch) -> None:
    """The address from which a machine in the cloud gets them is not there."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9/169.254.169.254")
    with pytest.raises(NotAllowed, match="no credentials were found: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are"):
        check_storage(place(bucket, "without any"))


def test_an_account_that_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(NotAllowed, match="AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY are not set"):
        check_storage(BucketUrl("az://runs/without an account"))


def test_a_wrong_key_of_azure() -> None:
    refused = pytest.raises(NotAllowed, match="403 .*AZURE_STORAGE_ACCOUNT_KEY")
    with azure_bucket() as url, environment(AZURE_STORAGE_ACCOUNT_KEY="d3Jvbmc="), refused:
        check_storage(BucketUrl(f"{url}/wrong"))


def test_a_missing_server_is_given_up_soon() -> None:
    started_s = time.monotonic()
    with environment(**s3_variables("http://127.0.0.1:9")), pytest.raises(OSError, match="no connection"):
        check_storage(BucketUrl("s3://runs/away"))
    assert time.monotonic() - started_s < 60.0


def test_a_missing_bucket(bucket: tuple[str, RequestProxy]) -> None:
    place(bucket, "")
    absent = BucketUrl("s3://absent/runs")
    with pytest.raises(OSError, match="there is no such bucket") as raised:
        check_storage(absent)
    assert "Create it, or name another; AWS_*" in access_error(absent, raised.value).remedy


def test_a_request_to_the_scheduler_names_what_a_bucket_lacks(
    bucket: tuple[str, RequestProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads storage, before anything is checked there."""
    guard, absent, lacking = StorageGuard(refusal_at), BucketUrl("s3://absent/runs"), place(bucket, "without a key")
    with pytest.raises(StorageError, match="there is no such bucket") as raised:
        guard.call(absent, 30.0, lambda: objects_at(absent).create("job.json", b""))
    assert "Create it, or name another" in raised.value.remedy
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(NotAllowed, match="no credentials were found: AWS_ACCESS_KEY_ID is not set"):
        guard.call(lacking, 30.0, lambda: objects_at(lacking).names(""))
