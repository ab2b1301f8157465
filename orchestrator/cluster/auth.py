"""Access control: a cluster reachable beyond loopback must ask for a token, and only its owner may read a token file.

Ray 2.60 lets anyone who reaches a port run anything unless it was started with RAY_AUTH_MODE=token, and a client with a
token silently joins a cluster that asks for none. So a request without a token is sent before connecting.
"""

import ipaddress
import os
import socket
import stat
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orchestrator.errors import ClusterUnreachable, NotAllowed

ALLOW_NO_TOKEN = "ORCHESTRATOR_ALLOW_NO_TOKEN"  # 1: accept clusters that ask for none
ANSWER_TIMEOUT_S = 5.0


def check_head(address: str) -> None:
    """Check that a cluster reachable beyond loopback asks for a token.

    Args:
        address: HOST:PORT of its head.

    Raises:
        NotAllowed: it asks for none.
        ClusterUnreachable: the process that listens there is no head of Ray.
    """
    import grpc  # type: ignore[import-untyped]  # Ray's Jobs API and dashboard need it too
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    if is_open_allowed():
        return
    question: Any = gcs_service_pb2.GetAllNodeInfoRequest()  # type: ignore[attr-defined]
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        nodes: Any = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)  # type: ignore[no-untyped-call]
        try:
            answer = nodes.GetAllNodeInfo(question, timeout=ANSWER_TIMEOUT_S)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                return
            raise ClusterUnreachable(
                f"what listens at {address} does not answer as a head of Ray: {error.details()}",
                remedy="Name the port of the head's GCS, 6379 unless it was started with another one.",
            ) from None
    known = {node.node_manager_address for node in answer.node_info_list}
    if not all(is_loopback(host) for host in {address.rpartition(":")[0].strip("[]"), *known}):
        raise _asks_for_none(address)


def check_jobs_port(url: str) -> None:
    """Check the same for a Jobs API. Raises NotAllowed, and RequestException if nothing answers."""
    import requests

    if is_open_allowed() or is_loopback(urlsplit(url).hostname or ""):
        return
    bare = {"auth": lambda request: request, "allow_redirects": False}  # nothing from ~/.netrc either
    if requests.get(f"{url.rstrip('/')}/api/version", timeout=ANSWER_TIMEOUT_S, **bare).ok:  # type: ignore[arg-type]
        raise _asks_for_none(url)


def check_token_file() -> None:
    """Check that this process's token file, if it uses one, is accessible to its owner only.

    Raises:
        NotAllowed: others have access to it, or it can't be read.
    """
    if os.environ.get("RAY_AUTH_MODE") != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = _token_path()
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise _is_unreadable(path, error) from None
    if mode & 0o077:
        raise NotAllowed(
            f"the token in {path} may be read by others (mode {mode:04o})",
            remedy=f"`chmod 600 {path}`, and have the cluster ask for another one if others may have seen it.",
        )


def read_token() -> str | None:
    """This process's token; None if it uses none. Raises NotAllowed as `check_token_file`."""
    check_token_file()
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return None
    path = _token_path()
    try:
        return (os.environ.get("RAY_AUTH_TOKEN") or path.read_text()).strip()
    except OSError as error:
        raise _is_unreadable(path, error) from None


def reread_environment() -> None:
    """Make Ray read the current environment: it read an earlier one if it was imported before."""
    from ray._private import ray_constants as constants
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    constants.ENABLE_RAY_CLUSTER = os.environ.get(constants.ENABLE_RAY_CLUSTERS_ENV_VAR, "1") not in ("0", "false")
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def token_refused(address: str) -> NotAllowed:
    return NotAllowed(
        f"the cluster at {address} refused this process: its token is missing or wrong",
        remedy="Point RAY_AUTH_TOKEN_PATH at the cluster's token and set RAY_AUTH_MODE=token.",
    )


def is_loopback(host: str) -> bool:
    """Whether a host name or address resolves to loopback addresses only."""
    try:
        found = socket.getaddrinfo(host, None)
    except OSError:
        return False
    return all(ipaddress.ip_address(str(info[4][0]).partition("%")[0]).is_loopback for info in found)


def is_open_allowed() -> bool:
    """Whether this process accepts clusters that ask for no token."""
    return os.environ.get(ALLOW_NO_TOKEN) == "1"


def _token_path() -> Path:
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()


def _is_unreadable(path: Path, error: OSError) -> NotAllowed:
    return NotAllowed(
        f"the cluster's token can't be read from {path}: {error.strerror}",
        remedy="Point RAY_AUTH_TOKEN_PATH at the file with it.",
    )


def _asks_for_none(address: str) -> NotAllowed:
    return NotAllowed(
        f"the cluster at {address} asks for no token and is reachable from beyond this machine: "
        "anyone who reaches it can run anything on it",
        remedy=f"Start it with RAY_AUTH_MODE=token (docs/clusters.md), or set {ALLOW_NO_TOKEN}=1 if no one else "
        "reaches its network.",
        unchanged="Nothing was sent.",
    )
