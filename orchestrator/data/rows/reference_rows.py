"""Pairs of answers with the starting model's log-probabilities, computed once by a process that loads torch."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.data.manifest import digest_file
from orchestrator.data.rows.row_store import RowStore
from orchestrator.data.rows.row_writer import rows_key
from orchestrator.errors import OrchestratorError
from orchestrator.spec.job import JobSpec

MODULE = "orchestrator.worker.reference_model"
ROOT = str(Path(__file__).parents[3])  # contains the package
SHOWN = 20  # lines of what the process printed


def with_reference(job: JobSpec, store: RowStore, directory: Path, progress: Callable[[str, float], None]) -> RowStore:
    """The store below `directory` with the log-probabilities, which is named by the pairs and the starting weights.

    Raises:
        OrchestratorError: the process failed; the message has what it printed last.
    """
    name = rows_key({"rows": store.digest, "weights": _weights(job), "precision": job.train.precision})
    if not (directory / name).is_dir():
        _compute(job, store, directory, name, progress)
    return RowStore.open(directory / name)


def _weights(job: JobSpec) -> dict[str, Any]:
    """What the starting weights depend on."""
    if job.model.init_from is None:
        model = job.model.model_dump(mode="json", exclude={"code_dir"})
        return {"seed": job.train.seed, "model": model}
    files = sorted(Path(job.model.init_from).glob("*.safetensors"))
    return {"files": {path.name: digest_file(path).sha256 for path in files}}


def _compute(job: JobSpec, store: RowStore, directory: Path, name: str, progress: Callable[[str, float], None]) -> None:
    path = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))
    printed = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed below; a pipe could fill up
    reading, writing = os.pipe()  # apart from what models and libraries print
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", MODULE, str(writing)],
        stdin=subprocess.PIPE,
        stdout=printed,
        stderr=printed,
        text=True,
        pass_fds=[writing],
        env={**os.environ, "PYTHONPATH": path},
    )
    os.close(writing)
    with printed, process, os.fdopen(reading) as shares:
        assert process.stdin is not None
        order = {"job": job.model_dump_json(by_alias=True), "store": str(store.directory), "to": str(directory)}
        process.stdin.write(json.dumps({**order, "name": name}))
        process.stdin.close()
        progress("reference model", 0.0)
        for line in shares:
            progress("reference model", float(line))
        process.wait()
        printed.seek(0)
        said = printed.read().splitlines()[-SHOWN:]
    if process.returncode:
        raise OrchestratorError(
            "the starting model's log-probabilities could not be computed:\n" + "\n".join(said),
            unchanged="No store was written.",
        )
