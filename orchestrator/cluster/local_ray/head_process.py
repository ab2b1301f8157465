"""`ray start` of a local cluster, whose workers' processes begin with `worker_setup`.

python -m orchestrator.cluster.local_ray.head_process start --head --block …
"""

from pathlib import Path
from typing import Any

from ray._private import parameter
from ray.scripts import scripts

SETUP = str(Path(__file__).with_name("worker_setup.py"))


class LocalRayParams(parameter.RayParams):
    """Ray's parameters of a node, which its command has no option for: the script of workers, and no server of Ray
    clients, for which there is no use on this machine."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**{"setup_worker_path": SETUP, **given, "ray_client_server_port": None})


def main() -> None:
    parameter.RayParams = LocalRayParams  # type: ignore[assignment, misc]
    scripts.main()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
