"""Writing of checkpoints: every rank writes its shard (`write_image`), then the controller the manifest (`commit`).

Files are read back from the device: a write that was lost or changed on the way fails. A file that a manifest names
never changes, because no file is ever written under a name that was used before.
"""

import errno
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from orchestrator.checkpoint.block_digests import BlockDigests, digests_of, digests_on_device, first_difference
from orchestrator.checkpoint.manifest import MANIFEST_FILE, CheckpointManifest, checkpoint_name
from orchestrator.checkpoint.shard_image import ShardImage
from orchestrator.checkpoint.stored_shard import stored_digests
from orchestrator.errors import CheckpointCorrupt
from orchestrator.protocol.worker_report import ShardWritten
from orchestrator.storage.atomic import flush, make_folders
from orchestrator.storage.backends.location import Location, objects_at
from orchestrator.storage.reserve import RESERVE_BYTES, reserve_in

CHUNK_BYTES = 2**22  # read and written at once


def write_image(
    checkpoints: Location, image: ShardImage, *, step: int, term: int, generation: int, rank: int
) -> ShardWritten:
    """Write one rank's part of a checkpoint, flush it to the device and read it back. A repeat writes another file.

    Args:
        checkpoints: location of the run's checkpoints.
        term: term of the generation's plan: it gives all ranks the same directory, even if the controller changes.

    Returns:
        the shard; `cost_s` is the processor time that this took.

    Raises:
        OSError: run storage has no room for it, can't be written, or holds something else than was written; complete
            checkpoints stay unchanged.
    """
    began_s = time.thread_time()
    checkpoint = checkpoints / checkpoint_name(step, term, generation)
    name = f"shard-{rank:05d}-{secrets.token_hex(4)}.safetensors"
    if isinstance(checkpoint, Path):
        _check_room(checkpoint.parents[1], image.num_bytes)
        digests, num_bytes = _write_to_directory(checkpoint, name, image)
    else:
        digests, num_bytes = _write_to_bucket(checkpoint, name, image)
    return ShardWritten(
        step=step,
        generation=generation,
        rank=rank,
        file=name,
        sha256=digests,
        num_bytes=num_bytes,
        header_sha256=image.header_sha256,
        meta_sha256=image.meta_sha256,
        cost_s=time.thread_time() - began_s,
    )


def _write_to_directory(directory: Path, name: str, image: ShardImage) -> tuple[tuple[str, ...], int]:
    make_folders(directory.parents[1], directory)  # in the run's directory
    with Path(image.path).open("rb") as memory:
        return _write_file(directory / name, iter(partial(memory.read, CHUNK_BYTES), b""))


def _write_to_bucket(checkpoint: Location, name: str, image: ShardImage) -> tuple[tuple[str, ...], int]:
    """Store an object and read it back; it is deleted if that fails."""
    objects, digests = objects_at(checkpoint), digests_of(Path(image.path))
    try:
        written = objects.put(name, Path(image.path))
        if difference := first_difference(stored_digests(checkpoint, name), digests):
            raise OSError(errno.EIO, f"{name} reads back changed: {difference}", str(checkpoint / name))
    except BaseException:
        with suppress(OSError):
            objects.delete([name])
        raise
    return digests, written.num_bytes


def _check_room(run_dir: Path, num_bytes: int) -> None:
    """Raise OSError if a file of that size doesn't fit. Writing it would take the last room from others until it fails,
    and one that fits into the space that was given up for the journal isn't meant to have it."""
    usage = shutil.disk_usage(next(path for path in (run_dir, *run_dir.parents) if path.exists()))
    needed = num_bytes + (0 if reserve_in(run_dir).exists() else RESERVE_BYTES)
    if usage.total > 0 and usage.free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def commit(checkpoints: Location, manifest: CheckpointManifest) -> Location:
    """Create the manifest of a checkpoint whose shards are written, and delete what attempts before them have left.
    A repeat changes nothing. The checkpoint counts once the run's journal names it with the manifest's digest; what is
    named there already isn't committed again.

    Returns:
        the checkpoint's location.

    Raises:
        CheckpointCorrupt: a shard is missing, or its size has changed since it was written.
        OSError: it can't be written; or it reads back changed, and is deleted if this call has created it. One that was
            there stays: another controller may have journalled it.
    """
    checkpoint = checkpoints / manifest.name
    objects = objects_at(checkpoint)
    sizes = {found.key: found.num_bytes for found in objects.objects("")}
    for name, entry in manifest.files.items():
        _check_size(checkpoint / name, sizes.get(name), entry.num_bytes)
    content = manifest.to_json().encode()
    written = BlockDigests()
    written.update(content)
    found = objects.create(MANIFEST_FILE, content)
    if difference := first_difference(_read_back(checkpoint, MANIFEST_FILE), written.all()):
        if MANIFEST_FILE not in sizes and found == content:
            objects.delete([MANIFEST_FILE])
        where = str(checkpoint / MANIFEST_FILE)
        raise OSError(errno.EIO, f"{MANIFEST_FILE} reads back changed: {difference}", where)
    hidden = [file.name for file in checkpoint.glob(".*")] if isinstance(checkpoint, Path) else []
    for name in {*sizes, *hidden} - {*manifest.files, MANIFEST_FILE}:
        with suppress(OSError):  # it does no harm there
            objects.delete([name])
    if isinstance(checkpoints, Path):
        for parent in (checkpoints, checkpoints.parent):
            flush(parent)
    return checkpoint


def _read_back(checkpoint: Location, name: str) -> tuple[str, ...]:
    """The digests of a file's blocks, as storage holds them."""
    return digests_on_device(checkpoint / name) if isinstance(checkpoint, Path) else stored_digests(checkpoint, name)


def _check_size(file: Location, found: int | None, num_bytes: int) -> None:
    if found != num_bytes:
        raise CheckpointCorrupt(
            f"{file} has {'no file' if found is None else f'{found} bytes'}, its rank wrote {num_bytes} bytes",
            unchanged="No checkpoint was marked complete; the earlier ones stay.",
        )


def _write_file(path: Path, chunks: Iterator[bytes | memoryview]) -> tuple[tuple[str, ...], int]:
    """Write, flush and read back a new file, which is removed if that fails. Returns (SHA-256 of each block, size in
    bytes)."""
    digests = BlockDigests()
    try:
        with path.open("xb") as file:
            for chunk in chunks:
                digests.update(chunk)
                file.write(chunk)
            num_bytes = file.tell()
            file.flush()
            os.fsync(file.fileno())
        if difference := first_difference(digests_on_device(path), digests.all()):
            raise OSError(errno.EIO, f"{path.name} reads back changed: {difference}", str(path))
        flush(path.parent)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return digests.all(), num_bytes
