"""Token stores in a bucket: put there once they are prepared, and read there by all nodes of a run.

    BUCKET/.data/NAME/train.tokens      as in a store's directory; manifest.json is created last
    ~/.orchestrator/data/NAME/          on each node: the small files, verified, and the blocks of tokens that were read
    ~/.orchestrator/data/NAME/train.blocks     those of `train.tokens` (`orchestrator.data.token_blocks`)

A store is named by its content, so what is there is the right one. No node holds the documents' ids, which nothing of
a run reads.
"""

import fcntl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from orchestrator.data.manifest import (
    DOCUMENTS,
    MANIFEST,
    SPLITS,
    FileDigest,
    Split,
    StoreManifest,
    digest_file,
    digests_file,
    tokens_file,
)
from orchestrator.data.store import TokenStore, check_file
from orchestrator.data.token_blocks import TokenBlocks
from orchestrator.errors import DataError, StoreCorrupt
from orchestrator.storage.atomic import flush, new_directory
from orchestrator.storage.backends.bucket_url import BucketUrl
from orchestrator.storage.backends.home import home
from orchestrator.storage.backends.location import Location, objects_at
from orchestrator.storage.objects import LargeObjects

READ_BYTES = 16 * 2**20  # at once, of a small file
NOT_COPIED = {DOCUMENTS, *(tokens_file(split) for split in SPLITS)}


def node_stores() -> Path:
    """Directory of this node's files of stores in buckets, and of stores that are prepared here for one."""
    return home() / "data"


def upload(directory: Path, files: Mapping[str, FileDigest], place: Location) -> None:
    """Copy the files of a store in `directory` below `place`, the manifest last. Files already there are kept. Raises
    OSError."""
    objects = objects_at(place)
    there = {found.key: found.num_bytes for found in objects.objects("")}
    for name, recorded in files.items():
        if there.get(name) != recorded.num_bytes:
            objects.put(name, directory / name)
    objects.create(MANIFEST, (directory / MANIFEST).read_bytes())


def open_store(place: Location) -> TokenStore:
    """The store at a location, opened. Tokens of one in a bucket are fetched when they are read; its small files are
    copied to this node first, unless that was done.

    Raises:
        DataError: there is no store.
        StoreCorrupt: a file doesn't match the manifest.
        OSError: it can't be read, or its small files not written here.
    """
    if isinstance(place, Path):
        return TokenStore.open(place)
    objects, here = objects_at(place), node_stores() / place.name
    with only_one(here.with_name(f".{here.name}.lock")):  # of this node's workers, which start together
        if not here.is_dir():
            copy_files(objects, place, here, lambda text: _small_files(StoreManifest.model_validate_json(text)))
    manifest = StoreManifest.model_validate_json((here / MANIFEST).read_bytes())
    for name, recorded in _small_files(manifest).items():
        check_file(here / name, recorded, verify=False)
    tokens = {split: _token_blocks(objects, place, here, manifest, split) for split in SPLITS}
    return TokenStore(here, manifest, digest_file(here / MANIFEST).sha256, tokens)


def _small_files(manifest: StoreManifest) -> dict[str, FileDigest]:
    return {name: recorded for name, recorded in manifest.files.items() if name not in NOT_COPIED}


def copy_files(
    objects: LargeObjects, place: BucketUrl, here: Path, files: Callable[[bytes], Mapping[str, FileDigest]]
) -> None:
    """Copy a store's manifest and files into a new directory, which appears once all of them have their digests.

    Args:
        files: those to copy, from the manifest.
    """
    try:
        manifest = objects.get(MANIFEST)
    except FileNotFoundError:
        raise DataError(
            f"{place} is no store of data: it holds no {MANIFEST}", remedy="Resume the run, which prepares it again."
        ) from None
    with new_directory(here) as directory:
        for name, recorded in files(manifest).items():
            with (directory / name).open("wb") as file:
                for start in range(0, recorded.num_bytes, READ_BYTES):
                    file.write(objects.get(name, start, min(start + READ_BYTES, recorded.num_bytes)))
            flush(directory / name)
            if (found := digest_file(directory / name)) != recorded:
                raise StoreCorrupt(
                    f"{place / name} has sha256 {found.sha256} and {found.num_bytes} bytes; {MANIFEST} has "
                    f"{recorded.sha256} and {recorded.num_bytes} bytes",
                    remedy=f"Delete {place / name} and resume the run, which stores it again.",
                    unchanged="Nothing was written.",
                )
        (directory / MANIFEST).write_bytes(manifest)
        flush(directory / MANIFEST)


def _token_blocks(
    objects: LargeObjects, place: BucketUrl, here: Path, manifest: StoreManifest, split: Split
) -> TokenBlocks:
    name, digests = tokens_file(split), digests_file(split)
    check_file(here / digests, manifest.files[digests], verify=True)  # else blocks of the bucket would seem damaged
    return TokenBlocks(
        objects,
        name,
        str(place / name),
        here / f"{split}.blocks",
        manifest.files[name].num_bytes,
        np.fromfile(here / digests, np.uint8),
        manifest.token_dtype,
    )


@contextmanager
def only_one(lock: Path) -> Iterator[None]:
    """Keep other processes of this node out meanwhile."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
