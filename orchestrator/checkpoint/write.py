"""Writing of checkpoints: every rank writes its shard (`write_shard`), then the controller the manifest (`commit`).

Files are read back from the device: a write that was lost or changed on the way fails. A file that a manifest names
never changes, because no file is ever written under a name that was used before.
"""

import errno
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from orchestrator.checkpoint.block_digests import BlockDigests, digests_on_device, first_difference
from orchestrator.checkpoint.manifest import MANIFEST_FILE, CheckpointManifest, checkpoint_name
from orchestrator.checkpoint.shard_file import ShardPiece
from orchestrator.checkpoint.shard_image import ShardImage, ShardMemory
from orchestrator.errors import CheckpointCorrupt
from orchestrator.protocol.worker_report import ShardWritten
from orchestrator.storage.atomic import create_atomically, flush
from orchestrator.storage.reserve import RESERVE_BYTES, reserve_in

CHUNK_BYTES = 2**22  # read and written at once


def write_shard(
    checkpoints: Path,
    pieces: Sequence[ShardPiece],
    *,
    step: int,
    term: int,
    generation: int,
    rank: int,
    meta: str = "{}",
) -> ShardWritten:
    """Write one rank's part of a checkpoint, flush it to the device and read it back. Arguments and errors are those of
    `ShardMemory` and `write_image`."""
    with ShardMemory(pieces, meta, rank) as memory:
        return write_image(checkpoints, memory.image, step=step, term=term, generation=generation, rank=rank)


def write_image(
    checkpoints: Path, image: ShardImage, *, step: int, term: int, generation: int, rank: int
) -> ShardWritten:
    """Write one rank's part of a checkpoint, flush it to the device and read it back. A repeat writes another file.

    Args:
        checkpoints: the run's directory of checkpoints.
        term: term of the generation's plan: it gives all ranks the same directory, even if the controller changes.

    Returns:
        the shard; `cost_s` is the processor time that this took.

    Raises:
        OSError: run storage has no room for it, can't be written, or holds something else than was written; complete
            checkpoints stay unchanged.
    """
    began_s = time.thread_time()
    _check_room(checkpoints.parent, image.num_bytes)
    directory = checkpoints / checkpoint_name(step, term, generation)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"shard-{rank:05d}-{secrets.token_hex(4)}.safetensors"
    with Path(image.path).open("rb") as memory:
        digests, num_bytes = _write_file(path, iter(partial(memory.read, CHUNK_BYTES), b""))
    return ShardWritten(
        step=step,
        generation=generation,
        rank=rank,
        file=path.name,
        sha256=digests,
        num_bytes=num_bytes,
        header_sha256=image.header_sha256,
        meta_sha256=image.meta_sha256,
        cost_s=time.thread_time() - began_s,
    )


def _check_room(run_dir: Path, num_bytes: int) -> None:
    """Raise OSError if a file of that size doesn't fit. Writing it would take the last room from others until it fails,
    and one that fits into the space that was given up for the journal isn't meant to have it."""
    usage = shutil.disk_usage(next(path for path in (run_dir, *run_dir.parents) if path.exists()))
    needed = num_bytes + (0 if reserve_in(run_dir).exists() else RESERVE_BYTES)
    if usage.total > 0 and usage.free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def commit(checkpoints: Path, manifest: CheckpointManifest) -> Path:
    """Create the manifest of a checkpoint whose shards are written, and delete what attempts before them have left.
    A repeat changes nothing. The checkpoint counts once the run's journal names it with the manifest's digest; what is
    named there already isn't committed again.

    Returns:
        the checkpoint's directory.

    Raises:
        CheckpointCorrupt: a shard is missing, or its size has changed since it was written.
        OSError: it can't be written; or it reads back changed, and is deleted if this call has created it. One that was
            there stays: another controller may have journalled it.
    """
    directory = checkpoints / manifest.name
    for name, entry in manifest.files.items():
        _check_size(directory / name, entry.num_bytes)
    content = manifest.to_json().encode()
    written = BlockDigests()
    written.update(content)
    path = directory / MANIFEST_FILE
    is_new = _create(path, content)
    if difference := first_difference(digests_on_device(path), written.all()):
        if is_new:
            path.unlink()
        raise OSError(errno.EIO, f"{MANIFEST_FILE} reads back changed: {difference}", str(path))
    for other in directory.iterdir():
        if other.name not in manifest.files and other != path:
            with suppress(OSError):  # it does no harm there
                other.unlink()
    for parent in (checkpoints, checkpoints.parent):
        flush(parent)
    return directory


def _create(path: Path, content: bytes) -> bool:
    """Create a file unless it is there. Returns whether this call has created it."""
    try:
        create_atomically(path, content)
    except FileExistsError:
        return False
    return True


def _check_size(path: Path, num_bytes: int) -> None:
    found = path.stat().st_size if path.exists() else None
    if found != num_bytes:
        raise CheckpointCorrupt(
            f"{path} has {'no file' if found is None else f'{found} bytes'}, its rank wrote {num_bytes} bytes",
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
