"""List of all runs that this cluster has seen, with their directories, in Ray's internal key-value store."""

from ray.experimental import internal_kv

from orchestrator.errors import NotFound, nearest
from orchestrator.storage.backends.location import Location, location_of

KV_NAMESPACE = b"orchestrator-runs"


def known_runs() -> list[str]:
    """Names of the runs."""
    return [key.decode() for key in internal_kv._internal_kv_list(b"", namespace=KV_NAMESPACE)]


def directory_of(run_id: str) -> Location:
    """The run's location. Raises NotFound, with the nearest names."""
    place = internal_kv._internal_kv_get(run_id.encode(), namespace=KV_NAMESPACE)
    if place is None:
        remedy = f"{nearest(run_id, known_runs())}`orchestrator ls` shows its runs."
        raise NotFound(f"this cluster has no run {run_id!r}", remedy=remedy)
    return location_of(place.decode())


def remember_run(run_id: str, run_dir: str) -> None:
    internal_kv._internal_kv_put(run_id.encode(), run_dir.encode(), overwrite=True, namespace=KV_NAMESPACE)


def forget_run(run_id: str) -> None:
    internal_kv._internal_kv_del(run_id.encode(), namespace=KV_NAMESPACE)
