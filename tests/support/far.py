"""A user of a local cluster who reaches nothing of it but its Jobs API: a directory, a token, a URL."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.cluster import local
from orchestrator.cluster.connection import disconnect
from orchestrator.protocol.status import RunStatus
from orchestrator.run_records.run_files import RunFiles
from tests.support.own_models import linear, own_spec
from tests.support.ports import free_port
from tests.support.real_runs import at_home
from tests.support.texts import small_job

ROOT = Path(__file__).parents[2]
PATIENCE_S = 200.0


class Far:
    """Runs commands of ours and of Ray's in `directory`; `record` is the cluster, for who looks into it."""

    def __init__(self, directory: Path, url: str, record: local.ClusterRecord, token: str = "") -> None:
        self.directory, self.url, self.record = directory, url, record
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "ORCHESTRATOR_"))}
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token or record.token_path}
        self.env = {**kept, **auth, "PYTHONPATH": str(ROOT), "ORCHESTRATOR_HOME": str(directory / "home")}

    def __call__(self, *args: str, expect: int = 0, module: str = "orchestrator.cli.main") -> Any:
        process = self.popen(*args, module=module)
        out, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == expect, f"{args} ended with {process.returncode}:\n{out}\n{err}"
        return subprocess.CompletedProcess(args, process.returncode, out, err)

    def popen(self, *args: str, module: str = "orchestrator.cli.main") -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", module, *args, "--address", self.url]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=self.directory, env=self.env, text=True, **pipes)  # type: ignore[call-overload]

    def ray(self, *args: str) -> str:
        return str(self("job", *args, module="ray.scripts.scripts").stdout)

    def job(self, texts: Path, storage: Path, name: str, source: str | None = None, **changes: Any) -> str:
        """A job with a model of the user's own, which lies beside it. Returns the name of its file."""
        spec = own_spec(self.directory, source or linear())
        plain = small_job(texts, max_steps=changes.pop("max_steps", 100_000))
        plain = plain.model_copy(update={"name": name, "model": spec, "storage": str(storage)})
        job = plain.model_dump(mode="json", by_alias=True) | {"workers": "1..3", **changes}
        job["model"]["code_dir"] = os.path.relpath(job["model"]["code_dir"], self.directory)
        (self.directory / f"{name}.yaml").write_text(json.dumps(job))
        return f"{name}.yaml"


@contextmanager
def far_cluster(home: Path, directory: Path, variables: Mapping[str, str] = {}) -> Iterator[Far]:
    """A local cluster with a Jobs API while this lasts. `variables` are in the environment of all its processes."""
    with at_home(home):
        os.environ.update(variables)
        port = free_port()
        up = local.up(4, jobs_port=port)
        try:
            yield Far(directory, f"http://127.0.0.1:{port}", up.record)
        finally:
            disconnect()
            local.down()


def until_stored(run_dir: Path, condition: Callable[[RunStatus], bool]) -> RunStatus:
    """Read from run storage, as a request by URL takes seconds."""
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        if (run_dir / "job.json").exists() and condition(status := RunFiles(run_dir).status()):
            return status
        assert time.monotonic() < deadline_s, run_dir
        time.sleep(0.1)
