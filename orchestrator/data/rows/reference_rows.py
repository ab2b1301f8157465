"""Pairs of answers with the starting model's log-probabilities, computed once by a process that loads torch."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from orchestrator.data.bucket_store import only_one
from orchestrator.data.manifest import digest_file
from orchestrator.data.rows.row_store import RowStore
from orchestrator.data.rows.row_writer import PREFIX, rows_key
from orchestrator.errors import OrchestratorError
from orchestrator.spec.job import JobSpec

MODULE = "orchestrator.worker.reference_model"
ROOT = str(Path(__file__).parents[3])  # contains the package
SHOWN = 20  # lines of what the process printed


def with_reference(job: JobSpec, store: RowStore, directory: Path, progress: Callable[[str, float], None]) -> RowStore:
    """The store below `directory` with the log-probabilities. It is named by the pairs and the starting weights, for a
    user's own model, whose weights may come from anywhere, by its content.

    Raises:
        OrchestratorError: the process failed; the message has what it printed last.
    """
    name = ""
    if job.model.entrypoint is None:
        model = job.model.model_dump(mode="json", exclude={"code_dir", "init_from"})
        made_of = {"rows": store.digest, "model": model, "precision": job.train.precision, "weights": _weights(job)}
        name = rows_key(made_of)
    with only_one(directory / f".reference-{name}.lock"):  # of processes that may compute the same
        if not name or not (directory / name).is_dir():
            name = _computed(job, store, directory, name, progress)
    return RowStore.open(directory / name)


def _weights(job: JobSpec) -> dict[str, Any]:
    """What the starting weights depend on, beside the model section."""
    if job.model.init_from is None:
        return {"seed": job.train.seed}
    files = sorted(Path(job.model.init_from).glob("*.safetensors"))
    of_routers = {"seed": job.train.seed} if job.model.upcycle else {}
    return of_routers | {path.name: digest_file(path).sha256 for path in files}


def _computed(job: JobSpec, store: RowStore, directory: Path, name: str, progress: Callable[[str, float], None]) -> str:
    """Have the store written. Returns its name."""
    path = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))
    # Ray gives a process that reserves no processor one thread. GPUs are the workers'.
    env = {"OMP_NUM_THREADS": str(os.cpu_count() or 1), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    printed = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed below; a pipe could fill up
    reading, writing = os.pipe()  # apart from what models and libraries print
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", MODULE, str(writing)],
        stdin=subprocess.PIPE,
        stdout=printed,
        stderr=printed,
        text=True,
        pass_fds=[writing],
        env={**os.environ, **env, "PYTHONPATH": path},
    )
    os.close(writing)
    with printed, process, os.fdopen(reading) as lines:
        order = {"job": job.model_dump_json(by_alias=True), "store": str(store.directory), "to": str(directory)}
        assert process.stdin is not None
        with suppress(BrokenPipeError), process.stdin as stdin:
            stdin.write(json.dumps({**order, "name": name}))
        progress("reference model", 0.0)
        for line in lines:
            if line.startswith(PREFIX):
                name = line.strip()
            else:
                progress("reference model", float(line))
        process.wait()
        printed.seek(0)
        said = printed.read().splitlines()[-SHOWN:]
    if process.returncode:
        raise OrchestratorError(
            "the starting model's log-probabilities could not be computed:\n" + "\n".join(said),
            unchanged="No store was written.",
        )
    return name
