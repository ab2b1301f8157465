"""A run's report from its journal and job in run storage. Needs no cluster."""

from collections.abc import Iterable

from orchestrator.code_package import placed
from orchestrator.errors import OrchestratorError
from orchestrator.policy.estimate.flops import ModelSize, size_of
from orchestrator.policy.health.expert_load import LoadMap, load_map, shown_loads
from orchestrator.policy.report.report import Rates, RunReport, report_of
from orchestrator.policy.state.run_state import StateDecided
from orchestrator.protocol.events.base import JournalEntry
from orchestrator.protocol.events.training import ExpertsRebalanced
from orchestrator.run_records.prepared_data import DataPrepared
from orchestrator.run_records.run_files import RunFiles
from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.location import Location
from orchestrator.submission.param_listing import state_of


def read_report(run_dir: Location, rates: Rates) -> RunReport:
    """The report of the run at this location.

    Raises:
        NotFound: it holds no run.
        NotFinished: the run has not written anything yet.
    """
    files = RunFiles(run_dir)
    entries = files.entries(leave_out=(StateDecided,))
    if not entries:
        return report_of(run_dir.name, entries)  # which raises NotFinished
    job = files.job()
    size, note = _size(job, run_dir, entries)
    gpus = job.resources.num_gpus
    return report_of(run_dir.name, entries, gpus_per_worker=gpus, size=size, size_note=note, rates=rates)


def read_load_map(run_dir: Location) -> LoadMap | None:
    """The loads of the run's experts over its steps; None if it has none."""
    files = RunFiles(run_dir)
    moves = (
        e.event.step + 1 for e in files.entries(only=(ExpertsRebalanced,)) if isinstance(e.event, ExpertsRebalanced)
    )
    return load_map(shown_loads(files.steps()), moves)


def _size(job: JobSpec, run_dir: Location, entries: Iterable[JournalEntry]) -> tuple[ModelSize | None, str]:
    """The model's size, with an embedding for the trained tokenizer's tokens; or why it isn't known."""
    prepared = [entry.event.data.vocab_size for entry in entries if isinstance(entry.event, DataPrepared)]
    if job.model.vocab_size is None and prepared:
        job = job.model_copy(update={"model": job.model.model_copy(update={"vocab_size": prepared[-1]})})
    if not job.has_tokens:
        return None, f"not known: rows of task {job.task.entrypoint or job.task.name} have no tokens"
    try:
        return size_of(job, state_of(placed(job, run_dir)).params), ""
    except OrchestratorError as error:  # a user-defined model whose code can't be read on this machine
        return None, f"not known: {error.message.strip().splitlines()[-1]}"
