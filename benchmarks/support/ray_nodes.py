"""Ray nodes on this machine for a baseline: own head, own temporary directory, nodes added when asked.

`ray start --block` per node, each in a session of its own, so that ending them ends all that they started and nothing
else. Several nodes on one machine need its own address (Ray keeps a cluster on loopback to one node), so the cluster
asks for a token.
"""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Self

import psutil

from orchestrator.cluster.processes import Process, describe, end_session

START_TIMEOUT_S = 90.0


def variables(folder: Path) -> dict[str, str]:
    """What the nodes and the driver need in their environment before Ray is imported: a token that only they know."""
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}


class RayNodes:
    """A cluster whose head has `num_cpus`. Its processes inherit `variables`.

    Raises:
        RuntimeError: a node did not start.
    """

    def __init__(self, num_cpus: int, variables: dict[str, str]) -> None:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        self._variables = kept | variables
        self._temp_dir = Path(tempfile.mkdtemp(prefix="rt-", dir="/tmp"))  # Ray's socket paths must stay short
        self._nodes: list[Process] = []
        try:
            self._start("head", num_cpus, "--head", "--port=0", "--include-dashboard=false")
            self.address = (self._temp_dir / "ray_current_cluster").read_text().strip()
        except BaseException:
            self.close()
            raise

    def add_node(self, num_cpus: int) -> None:
        """One more node; returns when it has joined."""
        self._start(f"node{len(self._nodes)}", num_cpus, f"--address={self.address}")

    def close(self) -> None:
        for leader in reversed(self._nodes):
            left = end_session(leader, (leader,))
            if left:
                raise RuntimeError(f"processes of the baseline's Ray would not end: {left}")
        shutil.rmtree(self._temp_dir, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _start(self, name: str, num_cpus: int, *options: str) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
        command += [f"--num-cpus={num_cpus}", f"--temp-dir={self._temp_dir}", *options]
        log_path = self._temp_dir / f"{name}.log"
        with log_path.open("wb") as log:
            node = subprocess.Popen(
                command,
                env=self._variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._nodes.append(describe(psutil.Process(node.pid)))
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while "Ray runtime started" not in log_path.read_text(errors="replace"):
            if node.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"Ray's {name} did not start: {log_path.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)
