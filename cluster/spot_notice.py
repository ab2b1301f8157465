"""Drains this node of a Ray cluster when AWS says that it takes the spot instance back: `python spot_notice.py`.

It asks the instance's metadata service every few seconds, which costs nothing. A drained node gets no workers any more,
and runs move theirs elsewhere before the instance is gone, two minutes after the notice. With that it ends.
"""

import argparse
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime

METADATA = "http://169.254.169.254"
TOKEN_S = 21600  # six hours, the longest that AWS allows
TIMEOUT_S = 5.0
LEAST_NOTICE_S = 5  # if it is read late, there is still a moment to leave


def notice(metadata: str) -> dict[str, str] | None:
    """What AWS is going to do with this instance: `action` and `time`; None as long as nothing is planned.

    Raises:
        OSError: the metadata service doesn't answer.
    """
    asking = urllib.request.Request(
        f"{metadata}/latest/api/token", method="PUT", headers={"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_S)}
    )
    with urllib.request.urlopen(asking, timeout=TIMEOUT_S) as answer:
        token = answer.read().decode()
    asking = urllib.request.Request(
        f"{metadata}/latest/meta-data/spot/instance-action", headers={"X-aws-ec2-metadata-token": token}
    )
    try:
        with urllib.request.urlopen(asking, timeout=TIMEOUT_S) as answer:
            found: dict[str, str] = json.load(answer)
            return found
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


def seconds_left(found: dict[str, str], now: datetime) -> int:
    """Whole seconds from `now` until the instance is gone, a few at least."""
    end = datetime.strptime(found["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    return max(LEAST_NOTICE_S, int((end - now).total_seconds()))


def this_node() -> tuple[str, str]:
    """The address of this machine's Ray cluster, HOST:PORT, and the id of this machine in it."""
    import ray

    ray.init(address="auto", log_to_driver=False, logging_level="error")
    context = ray.get_runtime_context()
    found = context.gcs_address, context.get_node_id()
    ray.shutdown()
    return found


def drain(address: str, node: str, found: dict[str, str], left_s: int) -> None:
    """Tell Ray that the node will be gone. Raises CalledProcessError if Ray doesn't take it."""
    options = {
        "address": address,
        "node-id": node,
        "reason": "DRAIN_NODE_REASON_PREEMPTION",
        "reason-message": f"AWS will {found['action']} the spot instance at {found['time']}",
        "deadline-remaining-seconds": left_s,
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node"]
    subprocess.run([*command, *(f"--{key}={value}" for key, value in options.items())], check=True, timeout=60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--metadata", default=METADATA, help="address of the instance's metadata service")
    parser.add_argument("--every", type=float, default=5.0, metavar="SECONDS", help="how often it is asked")
    options = parser.parse_args()
    address, node = this_node()
    print(f"node {node} of {address} waits for a notice of {options.metadata}", flush=True)
    while True:
        try:
            found = notice(options.metadata)
        except OSError as error:  # it limits how often it is asked; the next time is soon
            print(f"no answer: {error}", flush=True)
            found = None
        if found is not None:
            left_s = seconds_left(found, datetime.now(UTC))
            drain(address, node, found, left_s)
            print(f"drained: {found['action']} in {left_s} s", flush=True)
            return
        time.sleep(options.every)


if __name__ == "__main__":
    main()
