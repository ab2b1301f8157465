"""Copies of token stores: into a bucket, once a store is prepared, and from there into a directory of each node.

    BUCKET/.data/NAME/train.tokens      as in a store's directory; manifest.json is created last
    ~/.orchestrator/data/NAME/          on each node, verified

A store is named by its content, so a copy that is there is the right one.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.data.manifest import MANIFEST, StoreManifest
from orchestrator.data.store import TokenStore
from orchestrator.errors import DataError
from orchestrator.storage.atomic import flush, new_directory
from orchestrator.storage.backends.home import home
from orchestrator.storage.backends.location import Location, objects_at
from orchestrator.storage.objects import LargeObjects

BLOCK_BYTES = 16 * 2**20  # read at once


def node_stores() -> Path:
    """Directory of this node's copies."""
    return home() / "data"


def upload(store: TokenStore, place: Location) -> None:
    """Copy a store's files below `place`, the manifest last. What is there already stays. Raises OSError."""
    objects = objects_at(place)
    there = {found.key: found.num_bytes for found in objects.objects("")}
    for name, recorded in store.manifest.files.items():
        if there.get(name) != recorded.num_bytes:
            objects.put(name, store.directory / name)
    objects.create(MANIFEST, (store.directory / MANIFEST).read_bytes())


def open_store(place: Location) -> TokenStore:
    """The store at a location, opened; from a bucket it is copied to this node first, unless that was done.

    Raises:
        DataError: there is no store.
        StoreCorrupt: a file doesn't match the manifest.
        OSError: it can't be read, or not written here.
    """
    if isinstance(place, Path):
        return TokenStore.open(place)
    copy = node_stores() / place.name
    with _only_one(copy.with_name(f".{copy.name}.lock")):  # of this node's workers, which start together
        if not copy.is_dir():
            _download(objects_at(place), place, copy)
    return TokenStore.open(copy)


def _download(objects: LargeObjects, place: Location, copy: Path) -> None:
    """Copy a store's files into a new directory, which appears once all of them have their digests."""
    try:
        manifest = objects.get(MANIFEST)
    except FileNotFoundError:
        raise DataError(
            f"{place} is no token store: it holds no {MANIFEST}", remedy="Resume the run, which prepares it again."
        ) from None
    with new_directory(copy) as directory:
        for name, recorded in StoreManifest.model_validate_json(manifest).files.items():
            with (directory / name).open("wb") as file:
                for start in range(0, recorded.num_bytes, BLOCK_BYTES):
                    file.write(objects.get(name, start, min(start + BLOCK_BYTES, recorded.num_bytes)))
            flush(directory / name)
        (directory / MANIFEST).write_bytes(manifest)
        flush(directory / MANIFEST)
        TokenStore.open(directory, verify=True)


@contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    """Keep other processes of this node out meanwhile."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
