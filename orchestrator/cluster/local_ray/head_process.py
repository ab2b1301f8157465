"""`ray start` of a local cluster, whose workers' processes begin with `worker_setup`.

python -m orchestrator.cluster.local_ray.head_process start --head --block …
"""

from pathlib import Path
from typing import Any

from ray._private import parameter
from ray.scripts import scripts

SETUP = str(Path(__file__).with_name("worker_setup.py"))


class LocalRayParams(parameter.RayParams):
    """Ray's parameters of a node, which its command has no option for."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**{"setup_worker_path": SETUP, **given})


def main() -> None:
    parameter.RayParams = LocalRayParams  # type: ignore[assignment, misc]
    scripts.main()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
