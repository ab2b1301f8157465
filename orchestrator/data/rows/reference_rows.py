"""Pairs of answers with the starting model's log-probabilities, computed once by a process that loads torch."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from orchestrator.data.bucket_store import only_one
from orchestrator.data.manifest import digest_file
from orchestrator.data.rows.row_store import RowStore
from orchestrator.data.rows.row_writer import rows_key
from orchestrator.errors import OrchestratorError
from orchestrator.protocol.child_process import REFERENCE_LINES, Fault, ReferenceOrder, ReferenceStore
from orchestrator.spec.job import JobSpec
from orchestrator.torch_process import TorchProcess

MODULE, STAGE = "orchestrator.worker.whole_models.reference_model", "reference model"


def with_reference(job: JobSpec, store: RowStore, directory: Path, progress: Callable[[str, float], None]) -> RowStore:
    """The store below `directory` with the log-probabilities, or the same one if the job's task needs none. It is named
    by the pairs and the starting weights, for a user's own model, whose weights may come from anywhere, by its content.

    Raises:
        OrchestratorError: that of the process; if it ended by itself, with what it printed last.
    """
    name = ""
    if job.model.entrypoint is None:
        model = job.model.model_dump(mode="json", exclude={"code_dir", "init_from"})
        made_of = {"rows": store.digest, "model": model, "precision": job.train.precision, "weights": _weights(job)}
        if job.train.quantization is not None:
            made_of["quantization"] = job.train.quantization.model_dump(mode="json")
        name = rows_key(made_of)
    with only_one(directory / f".reference-{name}.lock"):  # of processes that may compute the same
        if not name or job.task.entrypoint is not None or not (directory / name).is_dir():
            name = _computed(job, store, directory, name, progress)
    return RowStore.open(directory / name)


def _weights(job: JobSpec) -> dict[str, Any]:
    """What the starting weights depend on, beside the model section."""
    if job.model.init_from is None:
        return {"seed": job.train.seed}
    adapter = None if job.model.lora is None else job.model.lora.init_from
    files = [path for place in (job.model.init_from, adapter) if place for path in Path(place).glob("*.safetensors")]
    of_routers = {"seed": job.train.seed} if job.model.upcycle else {}
    return of_routers | {path.name: digest_file(path).sha256 for path in sorted(files)}


def _computed(job: JobSpec, store: RowStore, directory: Path, name: str, progress: Callable[[str, float], None]) -> str:
    """Have the store written. Returns its name."""
    # Ray gives a process that reserves no processor one thread. GPUs are the workers'.
    env = {"OMP_NUM_THREADS": str(os.cpu_count() or 1), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    order = ReferenceOrder(job.model_dump_json(by_alias=True), str(store.directory), str(directory), name)
    with TorchProcess(MODULE, REFERENCE_LINES, env) as process:
        with suppress(OSError):  # it has ended: its exit code shows why
            process.send(order)
        progress(STAGE, 0.0)
        for answer in process.answers():
            if isinstance(answer, Fault):
                raise answer.error()
            if isinstance(answer, ReferenceStore):
                return answer.name
            progress(STAGE, answer.share)
        code = process.exit_code()
        raise OrchestratorError(
            f"the starting model's log-probabilities could not be computed ({code}):\n{process.output()}",
            unchanged="No store was written.",
        )
