"""Objects in a bucket of S3, Google Cloud Storage or Azure, or of a server that has one of their protocols.

An object is created by a request that fails if its name is taken (`If-None-Match: *` or its like). Any answer but a
success leaves open whether it was stored: a reply may be lost, S3 answers 409 while another request is under way, and
a request that was sent again finds the success of its first time. So the object is read then: it is this caller's, or
another's, or absent, and the request is made again.

Credentials come from the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL and such;
GOOGLE_APPLICATION_CREDENTIALS; AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY. Without them those of the machine
are used, if it is one in the cloud.
"""

import errno
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import obstore
from obstore.exceptions import BaseError
from obstore.store import ObjectStore, from_url

from orchestrator.errors import UsageError
from orchestrator.storage.backends.bucket_url import PREFIXES
from orchestrator.storage.backends.patience import PATIENCE, Patience
from orchestrator.storage.backends.request_errors import os_error
from orchestrator.storage.objects import StoredObject, Written

R = TypeVar("R")

PART_BYTES = 8 * 2**20  # of a large object
MOST_PARTS = 10_000  # that S3 takes
PARTS_AT_ONCE = 4
SMALL_BYTES = 2**17
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0  # between attempts
MOST_RETRIES = 20  # of a request, within the limit of time
REFUSALS = (errno.EACCES, errno.ENODEV, errno.EINVAL)  # nothing was done, and no other attempt will help
FINAL = (*REFUSALS, errno.ENOENT, errno.ERANGE)
LONGEST_READ_S = 3600.0  # of a whole object, whose bytes come one after the other


class BucketObjects:
    """Objects below a URL such as `s3://bucket/runs/demo`, as `storage.objects.LargeObjects`. Picklable.

    Parts of a large object whose upload is cut off stay until a lifecycle rule of the bucket deletes them; they are no
    object.
    """

    def __init__(self, url: str, patience: Patience = PATIENCE) -> None:
        self._url, self._patience = url, patience
        scheme, _, rest = url.partition("://")
        bucket, _, path = rest.partition("/")
        self._bucket, self._prefix = f"{scheme}://{bucket}", f"{path}/" if path else ""

    def create(self, key: str, data: bytes) -> bytes:
        is_small = len(data) < SMALL_BYTES
        store = partial(self._store, self._patience.answer_s if is_small else self._patience.upload_s)

        def create_or_read() -> bytes:
            try:
                with self._os_errors(key):
                    obstore.put(store(), self._prefix + key, data, mode="create")
                return data
            except OSError as error:
                self._refuse_unconditional(error)
                if error.errno in REFUSALS:
                    raise
                with suppress(FileNotFoundError):
                    return self.get(key)
                raise

        return self._repeated(create_or_read)

    def put(self, key: str, file: Path) -> Written:
        digest, num_bytes, num_read = sha256(), file.stat().st_size, 0
        part_bytes, name = max(PART_BYTES, -(-num_bytes // MOST_PARTS)), self._prefix + key

        def parts() -> Iterator[bytes]:
            nonlocal num_read
            with file.open("rb") as source:
                while part := source.read(part_bytes):
                    digest.update(part)
                    num_read += len(part)
                    yield part

        try:
            with self._os_errors(key):
                store = self._store(self._patience.upload_s, retries=True)
                if num_bytes <= part_bytes:
                    obstore.put(store, name, b"".join(parts()), use_multipart=False)
                else:
                    obstore.put(store, name, parts(), chunk_size=part_bytes, max_concurrency=PARTS_AT_ONCE)
        except OSError:  # it may exist, if the reply to the last request was lost
            if num_read < num_bytes or not self._holds(key, num_bytes):
                raise
        return Written(digest.hexdigest(), num_read)

    def get(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        name = self._prefix + key

        def get() -> bytes:
            with self._os_errors(key):
                store = self._store(LONGEST_READ_S, silence_s=self._patience.answer_s)
                if stop is not None:
                    return bytes(obstore.get_range(store, name, start=start, end=stop))
                if start:
                    return bytes(obstore.get(store, name, options={"range": {"offset": start}}).bytes())
                return bytes(obstore.get(store, name).bytes())

        try:
            return self._repeated(get)
        except OSError as error:
            if error.errno == errno.ERANGE:  # it ends at or before `start`
                return b""
            raise

    def names(self, folder: str) -> tuple[str, ...]:
        def names() -> tuple[str, ...]:
            with self._os_errors(folder):
                found = obstore.list_with_delimiter(self._store(self._patience.answer_s), self._within(folder))
            keys = [*found["common_prefixes"], *(entry["path"] for entry in found["objects"])]
            return tuple(sorted(key.rpartition("/")[2] for key in keys))

        return self._repeated(names)

    def objects(self, folder: str) -> tuple[StoredObject, ...]:
        def objects() -> tuple[StoredObject, ...]:
            with self._os_errors(folder):
                found = obstore.list(self._store(self._patience.answer_s), self._within(folder)).collect()
            return tuple(sorted(_stored(entry, self._prefix) for entry in found))

        return self._repeated(objects)

    def delete(self, keys: Iterable[str]) -> None:
        keys = tuple(keys)
        if not keys:
            return
        try:
            self._repeated(partial(self._delete_once, keys))
        except FileNotFoundError:  # which of them, and whether others were deleted, is not known
            for key in keys:
                with suppress(FileNotFoundError):
                    self._repeated(partial(self._delete_once, (key,)))

    def _delete_once(self, keys: tuple[str, ...]) -> None:
        with self._os_errors(keys[0]):
            obstore.delete(self._store(self._patience.answer_s), [self._prefix + key for key in keys])

    def _repeated(self, request: Callable[[], R]) -> R:
        """The result of a request, which is made again if its failure may pass."""
        deadline_s, pause_s = time.monotonic() + self._patience.retry_s, FIRST_PAUSE_S
        while True:
            try:
                return request()
            except OSError as error:
                if error.errno in FINAL or time.monotonic() + pause_s > deadline_s:
                    raise
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _holds(self, key: str, num_bytes: int) -> bool:
        with suppress(OSError), self._os_errors(key):
            return obstore.head(self._store(self._patience.answer_s), self._prefix + key)["size"] == num_bytes
        return False

    def _refuse_unconditional(self, failure: OSError) -> None:
        if failure.errno == errno.ENOTSUP:
            raise UsageError(
                f"{self._url} can't create an object only if its name is free ({failure.strerror})",
                remedy="Name run storage on a service with conditional writes.",
                unchanged="Nothing was written.",
            ) from failure

    def _store(self, request_s: float, silence_s: float | None = None, retries: bool = False) -> ObjectStore:
        retry_s = self._patience.retry_s if retries else 0.0
        return _open_store(self._bucket, request_s, silence_s or request_s, retry_s, _variables(self._bucket))

    def _within(self, folder: str) -> str | None:
        """The prefix of names in a folder; None for all of the bucket."""
        return (self._prefix + folder).rstrip("/") or None

    def _where(self, key: str) -> str:
        return f"{self._url}/{key}"

    @contextmanager
    def _os_errors(self, key: str) -> Iterator[None]:
        """Raise errors of requests as OSError."""
        try:
            yield
        except (BaseError, FileNotFoundError) as error:
            raise os_error(error, self._where(key)) from None


def _stored(entry: Mapping[str, Any], prefix: str) -> StoredObject:
    return StoredObject(entry["path"].removeprefix(prefix), entry["size"], entry["last_modified"].timestamp())


def _variables(url: str) -> frozenset[tuple[str, str]]:
    """Environment variables that a client of this URL reads."""
    prefix = PREFIXES[url.partition(":")[0]]
    return frozenset((name, value) for name, value in os.environ.items() if name.startswith(prefix))


@lru_cache(maxsize=64)
def _open_store(
    url: str, request_s: float, silence_s: float, retry_s: float, variables: frozenset[tuple[str, str]]
) -> ObjectStore:
    """The client of a bucket, with its connections, which all objects of that bucket in this process share.

    Args:
        request_s: limit of a whole request.
        silence_s: limit of the time without another byte of an answer.
        variables: that it reads from the environment now: with others there is another client.
    """
    allow_http = os.environ.get(f"{PREFIXES[url.partition(':')[0]]}_ALLOW_HTTP", "")
    return from_url(
        url,
        client_options={
            "timeout": timedelta(seconds=request_s),
            "read_timeout": timedelta(seconds=silence_s),
            "connect_timeout": timedelta(seconds=silence_s),
            "allow_http": allow_http.lower() in ("true", "1"),
        },
        retry_config={
            "max_retries": MOST_RETRIES if retry_s else 0,
            "retry_timeout": timedelta(seconds=retry_s),
            "backoff": {
                "init_backoff": timedelta(seconds=FIRST_PAUSE_S),
                "max_backoff": timedelta(seconds=LONGEST_PAUSE_S),
                "base": 2,
            },
        },
    )
