"""Stores of rows in a bucket, of which each node keeps a whole copy."""

from pathlib import Path

from orchestrator.data.bucket_store import copy_files, node_stores, only_one
from orchestrator.data.rows.row_store import RowManifest, RowStore
from orchestrator.storage.backends.location import Location, objects_at


def open_rows(place: Location) -> RowStore:
    """The store at a location, opened. One in a bucket is copied to this node first, unless that was done.

    Raises:
        DataError: there is no store.
        StoreCorrupt: a file doesn't match the manifest.
        OSError: it can't be read, or not written here.
    """
    if isinstance(place, Path):
        return RowStore.open(place)
    here = node_stores() / place.name
    with only_one(here.with_name(f".{here.name}.lock")):  # of this node's workers, which start together
        if not here.is_dir():
            copy_files(objects_at(place), place, here, lambda text: RowManifest.model_validate_json(text).files)
    return RowStore.open(here)
