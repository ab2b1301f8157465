"""Writing of checkpoints: every rank writes its shard (`write_shard`), then the controller the marker (`commit`).

Files are read back from the device before they get their names: a write that was lost or changed on the way fails.

The shards of a step stay in a hidden directory until every rank has reported its own; `commit` adds the manifest and
renames the directory. So a checkpoint is complete, or does not exist.
"""

import errno
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from orchestrator.checkpoint.block_digests import BlockDigests, digests_on_device, first_difference
from orchestrator.checkpoint.manifest import MANIFEST_FILE, CheckpointManifest, incomplete_name, step_name
from orchestrator.checkpoint.read import DISCARDED_PREFIX, read_manifest, set_aside
from orchestrator.checkpoint.shard_file import ShardPiece
from orchestrator.checkpoint.shard_image import ShardImage, ShardMemory
from orchestrator.errors import CheckpointCorrupt, ProtocolError, TermSuperseded
from orchestrator.protocol.worker_report import ShardWritten
from orchestrator.storage.atomic import flush, replacing
from orchestrator.storage.reserve import RESERVE_BYTES, reserve_in

CHUNK_BYTES = 2**22  # read and written at once
_FENCE_FILE = ".term"  # holds the highest term that has committed here


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
    """Write one rank's part of a checkpoint, flush it to the device and read it back. A repeat replaces the file.

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
    directory = checkpoints / incomplete_name(step, term, generation)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"shard-{rank:05d}.safetensors"
    with Path(image.path).open("rb") as memory:
        sha256, num_bytes = _write_file(path, iter(partial(memory.read, CHUNK_BYTES), b""))
    return ShardWritten(
        step=step,
        generation=generation,
        rank=rank,
        file=path.name,
        sha256=sha256,
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


def commit(checkpoints: Path, manifest: CheckpointManifest, *, term: int) -> Path:
    """Mark the shards of `manifest` a complete checkpoint. Only the run's controller calls this; it is idempotent.

    A checkpoint of the same step is replaced if its (term, generation) is lower: the step was trained again. Those of
    later steps by lower ones are hidden, as `set_aside` does: their steps were given up.

    Args:
        term: the controller's own. It may be higher than the manifest's: a restarted controller commits the shards
            of its predecessor's generation.

    Raises:
        TermSuperseded: a controller with a higher term has committed here.
        ProtocolError: a later generation has committed this step.
        CheckpointCorrupt: a shard is missing, or its size has changed since it was written.
    """
    final = checkpoints / step_name(manifest.step)
    existing = _manifest_or_none(final)
    _refuse_the_past(checkpoints, manifest, existing, term)
    if existing == manifest:
        _hide_abandoned(checkpoints, manifest)
        return final
    source = checkpoints / incomplete_name(manifest.step, manifest.term, manifest.generation)
    for name, entry in manifest.files.items():
        _check_size(source / name, entry.num_bytes)
    _write_file(source / MANIFEST_FILE, iter([manifest.to_json().encode()]))
    if final.exists():  # a crash between the two renames leaves all shards; the controller's retry completes them
        replaced = checkpoints / f"{DISCARDED_PREFIX}{final.name}"
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
        source.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        source.rename(final)
    _hide_abandoned(checkpoints, manifest)
    flush(checkpoints)
    return final


def _hide_abandoned(checkpoints: Path, manifest: CheckpointManifest) -> None:
    """Hide checkpoints of later steps that the run went back behind, so that the newest step is the newest state."""
    now = (manifest.term, manifest.generation)
    set_aside(checkpoints, manifest.step, f"{now[0]:06d}-{now[1]:06d}", before=now)


def _refuse_the_past(
    checkpoints: Path, manifest: CheckpointManifest, existing: CheckpointManifest | None, term: int
) -> None:
    """Raise if a later writer has committed; else record this term, so that earlier writers are refused."""
    fence = checkpoints / _FENCE_FILE
    highest = int(fence.read_text()) if fence.exists() else -1
    if highest > term:
        raise TermSuperseded(
            f"term {term} may not commit step {manifest.step}: term {highest} commits to {checkpoints}",
            unchanged="No checkpoint was changed.",
        )
    if existing and (existing.term, existing.generation) > (manifest.term, manifest.generation):
        raise ProtocolError(
            f"generation {manifest.generation} may not commit step {manifest.step}: "
            f"generation {existing.generation} has done so",
            unchanged="No checkpoint was changed.",
        )
    if highest < term:
        _write_file(fence, iter([str(term).encode()]))


def _manifest_or_none(path: Path) -> CheckpointManifest | None:
    """The manifest of a checkpoint; None if it is missing or corrupt and may be replaced."""
    try:
        return read_manifest(path)
    except CheckpointCorrupt:
        return None


def _check_size(path: Path, num_bytes: int) -> None:
    found = path.stat().st_size if path.exists() else None
    if found != num_bytes:
        raise CheckpointCorrupt(
            f"{path} has {'no file' if found is None else f'{found} bytes'}, its rank wrote {num_bytes} bytes",
            unchanged="No checkpoint was marked complete; the earlier ones stay.",
        )


def _write_file(path: Path, chunks: Iterator[bytes | memoryview]) -> tuple[tuple[str, ...], int]:
    """Write, flush, read back and rename into place; returns (sha256 of each block, size in bytes)."""
    digests = BlockDigests()
    with replacing(path) as file:
        for chunk in chunks:
            digests.update(chunk)
            file.write(chunk)
        num_bytes = file.tell()
        file.flush()
        _read_back(Path(file.name), path.name, digests.all())
    return digests.all(), num_bytes


def _read_back(written: Path, name: str, sha256: tuple[str, ...]) -> None:
    """Raise OSError if the device holds anything else."""
    flush(written)
    if difference := first_difference(digests_on_device(written), sha256):
        raise OSError(errno.EIO, f"{name} reads back changed: {difference}", str(written))
