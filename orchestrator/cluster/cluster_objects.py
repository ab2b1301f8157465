"""Objects in the cluster's key-value store, for what must outlive a process but not the cluster."""

import errno
import secrets
from collections.abc import Callable, Iterable
from typing import Any

from ray.experimental import internal_kv

NAMESPACE = b"orchestrator-objects"


class ClusterObjects:
    """Objects below `root`. They are lost with the cluster's head. This process must have joined the cluster.

    The contract is that of `storage.objects.Objects`; errors of the head are raised as OSError.
    """

    def __init__(self, root: str) -> None:
        self._root = f"{root}/"

    def create(self, key: str, data: bytes) -> bytes:
        while True:
            is_new = not _call(internal_kv._internal_kv_put, self._name(key), data, False)
            found = data if is_new else self._found(key)
            if found is not None:  # else it was deleted meanwhile
                return found

    def get(self, key: str) -> bytes:
        found = self._found(key)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "the cluster has no such object", key)
        return found

    def names(self, folder: str) -> tuple[str, ...]:
        prefix = self._name(f"{folder}/" if folder else "")
        keys: list[bytes] = _call(internal_kv._internal_kv_list, prefix)
        return tuple(sorted({key[len(prefix) :].split(b"/")[0].decode() for key in keys}))

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            _call(internal_kv._internal_kv_del, self._name(key))

    def _found(self, key: str) -> bytes | None:
        found: bytes | None = _call(internal_kv._internal_kv_get, self._name(key))
        return found

    def _name(self, key: str) -> bytes:
        return (self._root + key).encode()


def cluster_id() -> str:
    """Id of this cluster, which no other one has. Raises OSError while its head doesn't answer."""
    return ClusterObjects("").create("id", secrets.token_hex(8).encode()).decode()


def _call(function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args, namespace=NAMESPACE)
    except Exception as error:  # Ray has several for a head that doesn't answer, and may have others tomorrow
        raise OSError(errno.EIO, f"the cluster's key-value store does not answer: {error}") from error
