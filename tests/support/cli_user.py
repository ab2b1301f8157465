"""A user of the command, with simulated workers."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.protocol.status import RunStatus
from orchestrator.run_records.final_status import has_ended, read_status
from orchestrator.run_records.run_history import user_events
from tests.support.simulated_services import hurry

ROOT = Path(__file__).parents[2]
# The product's command. Runs that it starts have workers that need no torch.
COMMAND = """
import sys
from orchestrator.cli.main import command
if sys.argv[1] in ("demo", "run", "submit", "resume"):
    import functools
    from orchestrator.client import OrchestratorClient
    from tests.support.simulated_services import simulated_parts
    OrchestratorClient.submit = functools.partialmethod(OrchestratorClient.submit, parts=simulated_parts())
    OrchestratorClient.resume = functools.partialmethod(OrchestratorClient.resume, parts=simulated_parts())
command()
"""
JOB: dict[str, Any] = {
    "schema": "v1",
    "workers": {"min": 1, "max": 3, "initial": 2},
    "resources": {"cpus": 0.5},
    "model": {"n_routed_experts": 8, "num_experts_per_tok": 2},
    "train": {"max_steps": 40, "global_batch_size": 16, "micro_batch_size": 4},
    "envs": {"SIM_STEP_S": "0.02"},
}


class Here:
    """A user in a directory, with a home of their own in it, of this name."""

    def __init__(self, directory: Path, home: str = "home") -> None:
        self.directory = directory
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        self.home = directory / home
        self.env = {**kept, "PYTHONPATH": str(ROOT), "ORCHESTRATOR_HOME": str(self.home)}

    def job(self, name: str, **changes: Any) -> str:
        (self.directory / f"{name}.yaml").write_text(json.dumps(JOB | {"name": name} | changes))
        return f"{name}.yaml"

    def start(self, *args: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", COMMAND, *args]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=self.directory, env=self.env, **pipes)

    def __call__(self, *args: str, expect: int = 0) -> "subprocess.CompletedProcess[str]":
        process = self.start(*args)
        stdout, stderr = process.communicate(timeout=200)
        assert process.returncode == expect, f"{args} ended with {process.returncode}:\n{stdout}\n{stderr}"
        return subprocess.CompletedProcess(args, process.returncode, stdout, stderr)

    def python(self, code: str) -> str:
        """Output of a program on the user's cluster."""
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, cwd=self.directory, env=self.env, capture_output=True, text=True, check=True
        ).stdout

    def until_event(self, run: str, kind: str, count: int = 1) -> None:
        """Wait until the run's journal has `count` events of this kind."""
        self.until(lambda: [event["kind"] for event in user_events(self.run_dir(run))].count(kind) >= count)

    def until_ended(self, run: str) -> RunStatus:
        self.until(lambda: has_ended(self.run_dir(run)))
        return read_status(self.run_dir(run))

    def hurry(self, run: str) -> None:
        hurry(self.run_dir(run))

    def run_dir(self, run: str) -> Path:
        return self.directory / "runs" / run

    def until(self, condition: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + 200.0
        while not condition():
            assert time.monotonic() < deadline_s, "it never came true"
            time.sleep(0.05)
