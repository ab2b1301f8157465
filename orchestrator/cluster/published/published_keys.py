"""Keys with which the runs of this cluster are signed, in the memory of its head."""

from contextlib import suppress

from ray.experimental import internal_kv

from orchestrator.cluster.cluster_objects import ClusterObjects
from orchestrator.storage.backends.signed_objects import SigningKey

ROOT = "signing-keys"


def publish_key(run_id: str, key: SigningKey | None) -> None:
    """Set the key of a run, or forget it. Raises OSError while the head doesn't answer."""
    objects = ClusterObjects(ROOT)
    objects.delete([run_id])
    if key is not None:
        objects.create(run_id, key.secret)


def published_key(run_id: str) -> SigningKey | None:
    """The key of a run; None also in a process that has left the cluster. Raises OSError while the head is silent."""
    if not internal_kv._internal_kv_initialized():  # type: ignore[no-untyped-call]
        return None
    with suppress(FileNotFoundError):
        return SigningKey(ClusterObjects(ROOT).get(run_id))
    return None
