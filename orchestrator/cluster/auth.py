"""Who gets into a cluster: one that is reached beyond loopback must ask for a token, and a token is its owner's alone.

Ray 2.60 lets whoever reaches a port run anything unless it was started with RAY_AUTH_MODE=token, and a client with a
token joins a cluster that asks for none without a word. So whoever is about to connect asks first, showing none.
"""

import ipaddress
import os
import socket
import stat
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orchestrator.errors import ClusterUnreachable, NotAllowed

ALLOW_NO_TOKEN = "ORCHESTRATOR_ALLOW_NO_TOKEN"  # 1: clusters that ask for none are taken as they are
ANSWER_TIMEOUT_S = 5.0


def check_head(address: str) -> None:
    """See that a cluster which is reached beyond loopback asks for a token.

    Args:
        address: HOST:PORT of its head.

    Raises:
        NotAllowed: it does not.
        ClusterUnreachable: what listens there does not answer as a head of Ray does.
    """
    import grpc  # type: ignore[import-untyped]  # Ray's Jobs API and dashboard need it too
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    if _is_allowed():
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
    """The same of a Jobs API. Raises NotAllowed, and RequestException where nobody answers."""
    import requests

    if _is_allowed() or is_loopback(urlsplit(url).hostname or ""):
        return
    bare = {"auth": lambda request: request, "allow_redirects": False}  # nothing from ~/.netrc either
    if requests.get(f"{url.rstrip('/')}/api/version", timeout=ANSWER_TIMEOUT_S, **bare).ok:  # type: ignore[arg-type]
        raise _asks_for_none(url)


def check_token_file() -> None:
    """See that the token that this process would show, if it is in a file, is its owner's alone.

    Raises:
        NotAllowed: it is not, or is not there.
    """
    if os.environ.get("RAY_AUTH_MODE") != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise NotAllowed(
            f"the cluster's token can't be read from {path}: {error.strerror}",
            remedy="Point RAY_AUTH_TOKEN_PATH at the file with it.",
        ) from None
    if mode & 0o077:
        raise NotAllowed(
            f"the token in {path} may be read by others (mode {mode:04o})",
            remedy=f"`chmod 600 {path}`, and have the cluster ask for another one if others may have seen it.",
        )


def reread_environment() -> None:
    """Have Ray take the environment of now: whoever imported it before us made it read that of then."""
    from ray._private import ray_constants as constants
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    constants.ENABLE_RAY_CLUSTER = os.environ.get(constants.ENABLE_RAY_CLUSTERS_ENV_VAR, "1") not in ("0", "false")
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def token_refused(address: str) -> NotAllowed:
    return NotAllowed(
        f"the cluster at {address} refused this process: its token is missing or another one",
        remedy="Point RAY_AUTH_TOKEN_PATH at the cluster's token and set RAY_AUTH_MODE=token.",
    )


def is_loopback(host: str) -> bool:
    """Whether all that a name or an address stands for is this machine alone."""
    try:
        found = socket.getaddrinfo(host, None)
    except OSError:
        return False
    return all(ipaddress.ip_address(str(info[4][0]).partition("%")[0]).is_loopback for info in found)


def _is_allowed() -> bool:
    return os.environ.get(ALLOW_NO_TOKEN) == "1"


def _asks_for_none(address: str) -> NotAllowed:
    return NotAllowed(
        f"the cluster at {address} asks for no token, and more than this machine reaches it: "
        "anybody there may run anything on it",
        remedy=f"Start it with RAY_AUTH_MODE=token (docs/clusters.md), or say {ALLOW_NO_TOKEN}=1 if nobody else "
        "reaches its network.",
        unchanged="Nothing was sent.",
    )
