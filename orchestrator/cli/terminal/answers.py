"""What commands print with `-o json`, where it is no value of another package."""

from dataclasses import dataclass
from typing import Any

from orchestrator.protocol.child_process import EvaluationResult, GenerationResult
from orchestrator.protocol.events.notices import StateDiffers
from orchestrator.protocol.messages import DesiredRunState


@dataclass(frozen=True)
class NamedRun:
    """The run that was submitted or resumed."""

    run_id: str


@dataclass(frozen=True, kw_only=True)
class RequestedState(DesiredRunState):
    """The state that was requested for a run, as its journal has it."""

    run_id: str


@dataclass(frozen=True)
class ChangedPriority:
    """The priority that a run has now."""

    run_id: str
    priority: int


@dataclass(frozen=True)
class KilledWorker:
    """The worker whose process was killed."""

    run_id: str
    worker: str


@dataclass(frozen=True)
class RemovedRun:
    """A run that was removed, and the directory that it had."""

    run_id: str
    run_dir: str


@dataclass(frozen=True)
class ListedCheckpoint:
    """A complete checkpoint. `step` is the last one done; `time` is when it was written, in `time.time()` seconds."""

    step: int
    bytes: int
    loss: float | None
    validation_loss: float | None
    time: float
    path: str


@dataclass(frozen=True)
class NamedCheckpoint:
    """A checkpoint that was written on request, verified, or removed."""

    run_id: str
    step: int
    path: str


@dataclass(frozen=True)
class PlacedExperts:
    """Experts of a run that workers got after `step`, and the largest load of a worker over the mean, minus 1, before
    and after. `moved` is 0 where they stay."""

    run_id: str
    step: int
    moved: int
    before: float
    after: float


@dataclass(frozen=True)
class NumberedExperts:
    """Experts of each MoE layer of a run before `step` and from the one after it on; equal where the number stays."""

    run_id: str
    step: int
    before: int
    after: int


@dataclass(frozen=True)
class AdoptedRun:
    """A run whose records count as signed with the key `key_id`. `checkpoint` is empty without any."""

    run_id: str
    key_id: str
    records: int
    checkpoint: str


@dataclass(frozen=True)
class ExportedModel:
    """A model that was written to `path`."""

    run_id: str
    checkpoint: str
    path: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel(EvaluationResult):
    """Loss of a run's model on rows: the mean over `units`, in nats. `dtype`: of its matrices."""

    run_id: str
    checkpoint: str
    source: str
    dtype: str


@dataclass(frozen=True, kw_only=True)
class GeneratedText(GenerationResult):
    """A prompt and its continuation, `text`. `ended`: the document ended before --max-tokens."""

    run_id: str
    checkpoint: str
    prompt: str
    seed: int
    dtype: str


@dataclass(frozen=True)
class ReplayedSteps:
    """Steps that were replayed. `equal`: every bit was the same; `difference` is the first one otherwise.

    `numerics_differ` has what differs between this machine and the run's first worker, `workers_differ` the same of the
    run's other workers.
    """

    run_id: str
    first_step: int
    last_step: int
    workers: int
    equal: bool
    difference: StateDiffers | None
    numerics_differ: dict[str, str]
    workers_differ: dict[str, dict[str, str]]


@dataclass(frozen=True)
class PreparedStore:
    """A token store, and the counts of what was read into it. `found`: it was there already."""

    store: str
    found: bool
    records: int
    empty: int
    sources: list[dict[str, Any]]
    quarantine: str | None
    splits: dict[str, dict[str, Any]]
    vocab_size: int
    tokenizer_digest: str


@dataclass(frozen=True)
class TeacherLogits:
    """A teacher's predictions for a token store, and its rows by split. `found`: they were there already."""

    logits: str
    found: bool
    teacher: str
    store: str
    sequence_length: int
    top_k: int
    temperature: float
    rows: dict[str, int]
    bytes: int
