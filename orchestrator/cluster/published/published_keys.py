"""Keys with which the runs of this cluster are signed, in the key-value store of its head."""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass

from ray.experimental import internal_kv

from orchestrator.cluster.cluster_objects import ClusterObjects
from orchestrator.storage.backends.location import Location
from orchestrator.storage.backends.signed_objects import SigningKey

ROOT = "signing-keys"


@dataclass(frozen=True)
class PublishedKey:
    """The key of a run.

    Args:
        secret: in hexadecimal.
        job_sha256: digest of the job's file, as it was submitted; empty for a run that was resumed.
    """

    run_dir: str
    secret: str
    job_sha256: str

    @property
    def key(self) -> SigningKey:
        return SigningKey(bytes.fromhex(self.secret))


def publish_key(run_dir: Location, key: SigningKey | None, job_sha256: str = "") -> None:
    """Set the key of a run; None: it has none. Raises OSError while the head doesn't answer."""
    forget_key(run_dir.name)
    if key is not None:
        published = PublishedKey(str(run_dir), key.secret.hex(), job_sha256)
        ClusterObjects(ROOT).create(run_dir.name, json.dumps(asdict(published)).encode())


def forget_key(run_id: str) -> None:
    """Forget the key of a run. Raises OSError while the head doesn't answer."""
    ClusterObjects(ROOT).delete([run_id])


def published_key(run_dir: Location) -> PublishedKey | None:
    """The key of a run; None also in a process that has left the cluster. Raises OSError while the head is silent."""
    if not internal_kv._internal_kv_initialized():  # type: ignore[no-untyped-call]
        return None
    with suppress(FileNotFoundError):
        published = PublishedKey(**json.loads(ClusterObjects(ROOT).get(run_dir.name)))
        return published if published.run_dir == str(run_dir) else None
    return None


def signer_in_cluster(run_dir: Location) -> SigningKey | None:
    """The key of a run, as `published_key` finds it."""
    published = published_key(run_dir)
    return None if published is None else published.key
