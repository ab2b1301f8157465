import errno

import pytest
from obstore.exceptions import GenericError, PermissionDeniedError, UnauthenticatedError

from orchestrator.storage.backends.request_errors import os_error
from orchestrator.storage.condition import StorageCondition, refusal

WHERE = "az://runs/demo/journal/0"


def answered(status: str, body: str = "") -> GenericError:
    return GenericError(
        "Error performing PUT https://a.blob.core.windows.net/runs/demo?sig=c2VjcmV0 in 1ms"
        f" - Server returned non-2xx status code: {status}: {body}"
    )


@pytest.mark.parametrize(
    ("status", "number", "condition"),
    [
        ("400 Bad Request", errno.EINVAL, StorageCondition.AWAY),
        ("408 Request Timeout", errno.EBUSY, StorageCondition.SLOW),
        ("429 Too Many Requests", errno.EBUSY, StorageCondition.SLOW),
        ("500 Internal Server Error", errno.EIO, StorageCondition.AWAY),
        ("501 Not Implemented", errno.ENOTSUP, StorageCondition.AWAY),
        ("503 Service Unavailable", errno.EBUSY, StorageCondition.SLOW),
        ("507 Insufficient Storage", errno.ENOSPC, StorageCondition.FULL),
    ],
)
def test_a_status_shows_the_condition_of_storage(status: str, number: int, condition: StorageCondition) -> None:
    error = os_error(answered(status), WHERE)
    assert (error.errno, error.strerror, error.filename) == (number, status, WHERE)
    assert refusal("it can't be written", error).condition is condition


def test_the_service_names_the_error() -> None:
    error = os_error(answered("503 Service Unavailable", "<Error><Code>SlowDown</Code></Error>"), WHERE)
    assert str(error) == f"[Errno {errno.EBUSY}] 503 Service Unavailable (SlowDown): '{WHERE}'"


def test_a_quota_is_full_storage() -> None:
    text = str(answered("403 Forbidden", "<Error><Code>QuotaExceeded</Code></Error>"))
    error = os_error(PermissionDeniedError(text), WHERE)
    assert error.errno == errno.EDQUOT and refusal("x", error).condition is StorageCondition.FULL


@pytest.mark.parametrize("kind", [PermissionDeniedError, UnauthenticatedError])
def test_a_refusal_is_missing_permission(kind: type[Exception]) -> None:
    error = os_error(kind(str(answered("403 Forbidden"))), WHERE)
    assert isinstance(error, PermissionError) and error.strerror == "403 Forbidden"


@pytest.mark.parametrize(
    "text",
    [
        "Generic S3 error: Missing SecretAccessKey",
        "Generic MicrosoftAzure error: Account must be specified",
        "Generic S3 error: Error performing PUT http://169.254.169.254/latest/api/token in 5s - HTTP error",
        "Generic GCS error: Error performing token request: Error performing GET http://metadata",
    ],
)
def test_missing_credentials_are_missing_permission(text: str) -> None:
    error = os_error(GenericError(text), WHERE)
    assert isinstance(error, PermissionError) and error.strerror == "no credentials were found"


@pytest.mark.parametrize(
    ("text", "number", "words"),
    [
        ("HTTP error: error sending request\n kind: Timeout,", errno.ETIMEDOUT, "no answer in time"),
        ("HTTP error: error sending request\n kind: Connect,", errno.EHOSTUNREACH, "no connection"),
        ("this normally indicates an incorrectly configured region", errno.ENODEV, "the bucket is in another region"),
        ("404 Not Found: <Code>ContainerNotFound</Code>", errno.ENODEV, "there is no such bucket"),
        ("HTTP error: https://a.blob.core.windows.net/runs?sig=c2VjcmV0", errno.EIO, "the request failed"),
    ],
)
def test_a_request_without_an_answer(text: str, number: int, words: str) -> None:
    error = os_error(GenericError(text), WHERE)
    assert (error.errno, error.strerror) == (number, words)


def test_no_message_holds_a_signature() -> None:
    assert "sig=" not in str(os_error(answered("500 Internal Server Error"), WHERE))


def test_an_absent_object_is_not_found() -> None:
    assert isinstance(os_error(FileNotFoundError("Object at location demo not found"), WHERE), FileNotFoundError)
