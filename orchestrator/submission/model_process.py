"""Requests to a run's model outside of training, in a child process: only that imports torch.

    for answer in ask_model(Generation(…)):
        ...

Needs run storage, no cluster.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from orchestrator.checkpoint.hf.export import INTEGERS, export_hf
from orchestrator.errors import DataError, NotFound, OrchestratorError
from orchestrator.protocol.child_process import MODEL_LINES, Answer, Export, ExportResult, Fault, Request
from orchestrator.run_records.checkpoints.search import DIRECTORY as CHECKPOINTS
from orchestrator.run_records.job_files import read_job
from orchestrator.run_records.prepared_data import DataPrepared, PreparedData
from orchestrator.run_records.run_files import RunFiles
from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.location import Location, is_there, location_of
from orchestrator.torch_process import TorchProcess

MODULE = "orchestrator.inference.process"


def ask_model(request: Request) -> Iterator[Answer]:
    """Yield the answers as they arrive, the result last. The process ends with the iterator.

    Raises:
        OrchestratorError: the error of the process, of the same class.
    """
    request = replace(request, code=RunFiles(location_of(request.run_dir)).job().code)
    with TorchProcess(MODULE, MODEL_LINES) as process:
        with suppress(OSError):  # it has ended: its exit code shows why
            process.send(request)
        for answer in process.answers():
            if isinstance(answer, Fault):
                raise answer.error()
            yield answer
        code = process.exit_code()
        if code != 0:
            raise OrchestratorError(f"the process with the model ended by itself ({code}):\n{process.output()}")


def write_loaded(run_dir: Location, checkpoint: Location, dtype: str, of_ema: bool, to: Path) -> int:
    """Have a model that has to be built for that written into a directory. Returns bytes of weights. Raises what
    `ask_model` raises."""
    request = Export(str(run_dir), str(checkpoint), str(to), dtype, of_ema)
    (result,) = ask_model(request)
    assert isinstance(result, ExportResult)
    return result.num_bytes


def export_model(
    run_dir: Location, job: JobSpec, checkpoint: Location, to: Path, dtype: str | None = None, of_ema: bool = False
) -> int:
    """Write a run's model as `export_hf` does, also one that transformers builds, one with adapters, which are merged,
    one with pruned neurons or heads, which are left out, or one of integers. Returns bytes of weights."""
    write_other = None
    is_loaded = job.model.lora is not None or job.train.prunes_units or dtype in INTEGERS
    if job.model.impl == "transformers" or is_loaded:
        write_other = partial(write_loaded, run_dir, checkpoint, dtype or job.train.precision, of_ema)
    return export_hf(checkpoint, job, run_dir / "tokenizer.json", to, dtype, of_ema, write_other)


def export_registered(run_dir: str, checkpoint: str, to: Path) -> None:
    """Write the model of the checkpoint of this name, for the run's tracker. Raises what `export_hf` raises."""
    place = location_of(run_dir)
    export_model(place, read_job(place), place / CHECKPOINTS / checkpoint, to)


def checkpoint_to_ask(run_id: str, run_dir: Location, step: int | None) -> Location:
    """The checkpoint of `step`, or the newest, digests checked.

    Raises:
        NotFound: there is no such checkpoint.
        CheckpointCorrupt: its files are missing or changed; the message names the previous good one.
    """
    checkpoint = RunFiles(run_dir).choose_checkpoint(step)
    if checkpoint is None:
        raise NotFound(
            f"run {run_id} has no checkpoint yet",
            remedy="One is written at its end, when it is paused or stopped, and every checkpoint.every steps.",
        )
    return checkpoint


def data_of(run_id: str, run_dir: Location) -> PreparedData:
    """The run's prepared data. Raises DataError if they no longer exist."""
    entries = RunFiles(run_dir).entries(only=(DataPrepared,))
    prepared = [entry.event.data for entry in entries if isinstance(entry.event, DataPrepared)]
    if not prepared or not is_there(location_of(prepared[-1].store_dir)):
        gone = f"is gone: {prepared[-1].store_dir}" if prepared else "was never prepared"
        raise DataError(
            f"the prepared data of run {run_id} {gone}",
            remedy="Resume the run, which prepares it again; of a run of text, name a text: --corpus SOURCE.",
        )
    return prepared[-1]
