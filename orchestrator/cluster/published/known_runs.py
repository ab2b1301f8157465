"""List of all runs that this cluster has seen, with their directories, in Ray's internal key-value store."""

from ray.experimental import internal_kv

from orchestrator.errors import NotFound, nearest
from orchestrator.storage.backends.location import Location, location_of

KV_NAMESPACE = b"orchestrator-runs"
TAKEN_OVER = b"orchestrator-runs-taken-over"  # namespace of the runs that other clusters have now


def known_runs() -> list[str]:
    """Names of the runs."""
    return [key.decode() for key in internal_kv._internal_kv_list(b"", namespace=KV_NAMESPACE)]


def directory_of(run_id: str) -> Location:
    """The run's location. Raises NotFound, with the nearest names, or with how another cluster took it over."""
    place = internal_kv._internal_kv_get(run_id.encode(), namespace=KV_NAMESPACE)
    if place is not None:
        return location_of(place.decode())
    taken_over = internal_kv._internal_kv_get(run_id.encode(), namespace=TAKEN_OVER)
    if taken_over is not None:
        raise NotFound(f"run {run_id} was taken over by another cluster: {taken_over.decode()}")
    remedy = f"{nearest(run_id, known_runs())}`orchestrator ls` shows its runs."
    raise NotFound(f"this cluster has no run {run_id!r}", remedy=remedy)


def remember_run(run_id: str, run_dir: str) -> None:
    internal_kv._internal_kv_put(run_id.encode(), run_dir.encode(), overwrite=True, namespace=KV_NAMESPACE)
    internal_kv._internal_kv_del(run_id.encode(), namespace=TAKEN_OVER)


def forget_run(run_id: str) -> None:
    internal_kv._internal_kv_del(run_id.encode(), namespace=KV_NAMESPACE)


def forget_taken_over(run_id: str, how: str) -> None:
    """Forget a run that another cluster has taken over. `directory_of` then raises NotFound with `how`."""
    internal_kv._internal_kv_put(run_id.encode(), how.encode(), overwrite=True, namespace=TAKEN_OVER)
    forget_run(run_id)
