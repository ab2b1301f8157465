"""Errors of requests to a bucket, as the system errors that a directory would raise.

Messages hold no text of the request: the address of a request to Azure may contain a signature.
"""

import errno
import re

from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

_NUMBERS = {
    401: errno.EACCES,
    403: errno.EACCES,
    404: errno.ENODEV,  # of an object it is a FileNotFoundError; so this is the bucket
    408: errno.EBUSY,
    409: errno.EBUSY,
    412: errno.EBUSY,
    416: errno.ERANGE,
    425: errno.EBUSY,
    429: errno.EBUSY,
    501: errno.ENOTSUP,
    503: errno.EBUSY,
    507: errno.ENOSPC,
}
_NO_CREDENTIALS = (
    "Missing AccessKeyId",
    "Missing SecretAccessKey",
    "Account must be specified",
    "169.254.169.254",  # where a machine in the cloud would have got its credentials from
    "token request",
)
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "bucket does not exist")


def os_error(error: BaseError | FileNotFoundError, where: str) -> OSError:
    """The system error that this error of a request amounts to.

    Args:
        where: URL of the object or folder, for its message.
    """
    text = str(error)
    if any(sign in text for sign in _NO_BUCKET):
        return OSError(errno.ENODEV, "there is no such bucket", where)
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, "there is no such object", where)
    if any(sign in text for sign in _NO_CREDENTIALS):
        return PermissionError(errno.EACCES, "no credentials were found", where)
    if isinstance(error, PermissionDeniedError | UnauthenticatedError) and "Quota" not in text:
        return PermissionError(errno.EACCES, _status(text), where)
    if "incorrectly configured region" in text:
        return OSError(errno.ENODEV, "the bucket is in another region", where)
    if "kind: Timeout" in text:
        return TimeoutError(errno.ETIMEDOUT, "no answer in time", where)
    if "kind: Connect" in text:
        return OSError(errno.EHOSTUNREACH, "no connection", where)
    return OSError(_number(text), _status(text), where)


def _number(text: str) -> int:
    if "Quota" in text:
        return errno.EDQUOT
    if "StartTooLarge" in text:  # Azure answers with another part, which obstore refuses
        return errno.ERANGE
    found = re.search(r"status code: (\d+)", text)
    status = int(found[1]) if found else 500
    return _NUMBERS.get(status, errno.EINVAL if 400 <= status < 500 else errno.EIO)


def _status(text: str) -> str:
    """The status of the answer, with the name of the error that the service gave it."""
    status = re.search(r"status code: (\d+ [\w ]+)", text)
    name = re.search(r"<Code>(\w+)</Code>", text)
    if status is None:
        return "the request failed"
    return status[1] + (f" ({name[1]})" if name else "")
