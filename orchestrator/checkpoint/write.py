"""Writing of checkpoints: every rank writes its shard (`write_image`), then the controller the manifest (`commit`).

Files are read back from the device: a write that was lost or changed on the way fails. A file that a manifest names
never changes, because no file is ever written under a name that was used before.
"""

import errno
import os
import secrets
import shutil
import time
from contextlib import closing, suppress
from pathlib import Path

from orchestrator.checkpoint.block_digests import drop_cached
from orchestrator.checkpoint.manifest import MANIFEST_FILE, CheckpointManifest, FileEntry, checkpoint_name
from orchestrator.checkpoint.shard_image import ShardImage
from orchestrator.checkpoint.stored_shard import open_shard
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
        make_folders(checkpoint.parents[1], checkpoint)  # in the run's directory
    written = FileEntry(image.digest(), image.num_bytes)
    try:
        if isinstance(checkpoint, Path):
            _write_file(checkpoint / name, Path(image.path))
        else:
            objects_at(checkpoint).put(name, Path(image.path))
        _read_back(checkpoint, name, written)
    except BaseException:
        with suppress(OSError):
            objects_at(checkpoint).delete([name])
        raise
    return ShardWritten(
        step=step,
        generation=generation,
        rank=rank,
        file=name,
        num_bytes=written.num_bytes,
        header_sha256=written.header_sha256,
        meta_sha256=image.meta_sha256,
        cost_s=time.thread_time() - began_s,
    )


def _write_file(path: Path, image: Path) -> None:
    """Write and flush a new file."""
    with image.open("rb") as memory, path.open("xb") as file:
        shutil.copyfileobj(memory, file, CHUNK_BYTES)
        file.flush()
        os.fsync(file.fileno())
    flush(path.parent)


def _read_back(checkpoint: Location, name: str, written: FileEntry) -> None:
    """Raise OSError if storage holds something else than was written."""
    if isinstance(checkpoint, Path):
        drop_cached(checkpoint / name)
    try:
        with closing(open_shard(checkpoint, name, written)) as shard:
            shard.verify()
    except CheckpointCorrupt as error:
        where = str(checkpoint / name)
        difference = error.message.removeprefix(f"{where}: ")
        raise OSError(errno.EIO, f"{name} reads back changed: {difference}", where) from error


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
    found = objects.create(MANIFEST_FILE, content)
    if isinstance(checkpoint, Path):
        drop_cached(checkpoint / MANIFEST_FILE)
    if objects.get(MANIFEST_FILE) != content:
        if MANIFEST_FILE not in sizes and found == content:
            objects.delete([MANIFEST_FILE])
        raise OSError(errno.EIO, f"{MANIFEST_FILE} reads back changed", str(checkpoint / MANIFEST_FILE))
    hidden = [file.name for file in checkpoint.glob(".*")] if isinstance(checkpoint, Path) else []
    for name in {*sizes, *hidden} - {*manifest.files, MANIFEST_FILE}:
        with suppress(OSError):  # it does no harm there
            objects.delete([name])
    if isinstance(checkpoints, Path):
        for parent in (checkpoints, checkpoints.parent):
            flush(parent)
    return checkpoint


def _check_size(file: Location, found: int | None, num_bytes: int) -> None:
    if found != num_bytes:
        raise CheckpointCorrupt(
            f"{file} has {'no file' if found is None else f'{found} bytes'}, its rank wrote {num_bytes} bytes",
            unchanged="No checkpoint was marked complete; the earlier ones stay.",
        )
