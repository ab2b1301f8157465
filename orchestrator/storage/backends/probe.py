"""Check at submission that storage does what a run needs: it creates an object only if its name is free, and objects
can be read, listed and deleted there. Errors shown to users for storage that refuses."""

import errno
import os
import secrets
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from orchestrator.errors import NotAllowed, OrchestratorError, StorageError, UsageError
from orchestrator.storage.backends.bucket_url import PREFIXES, BucketUrl
from orchestrator.storage.backends.last_read import note_read
from orchestrator.storage.backends.location import Location, objects_at
from orchestrator.storage.backends.patience import Patience
from orchestrator.storage.guard import refusal
from orchestrator.storage.objects import LargeObjects

SHORT = Patience(answer_s=3.0, upload_s=3.0, retry_s=1.0)  # someone waits for the answer
UNCHANGED = "Nothing was started."
ONLY_READ = "Nothing was changed."
# Variables by which a bucket's credentials are given: those that belong together, in the order in which they are named.
CREDENTIALS = {
    "s3": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
    "gs": ("GOOGLE_APPLICATION_CREDENTIALS",),
    "az": ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY"),
}


def check_storage(location: Location) -> None:
    """Create, read, list and delete an object at a location. It is gone afterwards; a directory is made, and stays.

    Raises:
        UsageError: an object that is there is overwritten, or objects can't be created conditionally.
        NotAllowed: a bucket refuses the credentials, or there are none.
        OSError: storage doesn't answer, or refuses for another reason.
    """
    objects, key = objects_at(location, SHORT), f"probe-{secrets.token_hex(8)}"
    try:
        if isinstance(location, Path):
            location.mkdir(parents=True, exist_ok=True)
        _check(objects, key, location)
    except PermissionError as error:
        if isinstance(location, BucketUrl):
            raise access_error(location, error) from error
        raise
    finally:
        with suppress(OSError):
            objects.delete([key])


def _check(objects: LargeObjects, key: str, location: Location) -> None:
    objects.create(key, b"first")
    if objects.create(key, b"second") != b"first" or objects.get(key) != b"first":
        raise UsageError(
            f"{location} overwrites an object whose name is taken, though the request forbids it: two controllers "
            "of a run could both write its journal",
            remedy="Name run storage on a service with conditional writes (If-None-Match), or a directory that all "
            "nodes share.",
            unchanged=UNCHANGED,
        )
    objects.names("")
    objects.delete([key])


def refusal_at(storage: Hashable, error: OSError) -> OrchestratorError:
    """The error shown to users for a call that storage refuses; it names missing credentials, or a missing bucket."""
    if isinstance(storage, BucketUrl) and (isinstance(error, PermissionError) or error.errno == errno.ENODEV):
        return access_error(storage, error, ONLY_READ)
    return refusal(storage, error)


@contextmanager
def reading(location: Location) -> Iterator[None]:
    """Raise the error shown to users for an OSError of the block, which reads what is at a location.

    Raises:
        NotAllowed: a bucket refuses the credentials, or there are none.
        StorageError: it can't be read for another reason.
    """
    note_read(str(location))
    try:
        yield
    except OSError as error:
        raise access_error(location, error, ONLY_READ) from error


def access_error(location: Location, error: OSError, unchanged: str = UNCHANGED) -> OrchestratorError:
    """The error shown to users for storage that can't be used."""
    if isinstance(location, Path) or not isinstance(error, PermissionError):
        remedy = "Try again once it answers."
        if isinstance(location, BucketUrl) and error.errno == errno.ENODEV:
            remedy = f"Create it, or name another; {PREFIXES[location.scheme]}_* give its region and server."
        reason = f"{location} can't be read: {error.strerror or error}: {error.filename or location}"
        return StorageError(reason, remedy=remedy, unchanged=unchanged)
    scheme = location.scheme
    missing = [name for name in CREDENTIALS[scheme] if name not in os.environ]
    unset = f": {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set" if missing else ""
    return NotAllowed(
        f"{location} can't be used: {error.strerror}{unset}",
        remedy=f"Set {' and '.join(CREDENTIALS[scheme])} to credentials that may read, write, list and delete objects "
        "there, where commands run and where the cluster is started, on all nodes; "
        f"{PREFIXES[scheme]}_* may give others.",
        unchanged=unchanged,
    )
