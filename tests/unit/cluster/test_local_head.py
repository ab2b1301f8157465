"""The command that starts Ray's head on this machine."""

from pathlib import Path

import pytest

from orchestrator.cluster.local_head import head_command


@pytest.mark.parametrize("jobs_port", [None, 8265])
def test_ray_itself_chooses_every_port_but_the_users(jobs_port: int | None) -> None:
    """One that is found free before may be taken once Ray binds it, which then doesn't start."""
    options = dict(part[2:].split("=", 1) for part in head_command(Path("temp"), 2, jobs_port) if "=" in part)
    ports = {key: value for key, value in options.items() if key.endswith("port")}
    assert ports.pop("dashboard-port") == str(jobs_port or 0)
    assert ports and set(ports.values()) == {"0"}
