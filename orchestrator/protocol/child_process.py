"""Messages, a line of JSON each, between a torch-free process and its child processes with torch."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from orchestrator import errors
from orchestrator.errors import EntrypointError, OrchestratorError, ProtocolError
from orchestrator.protocol.codec import from_plain, to_plain
from orchestrator.protocol.messages import GenerationPlan, StoreAddress
from orchestrator.protocol.step_record import StepRecord
from orchestrator.protocol.worker_job import WorkerJob


class Lines:
    """Writes and reads messages of the given dataclasses."""

    def __init__(self, *kinds: type[Any]) -> None:
        self._kinds = {kind.__name__: kind for kind in kinds}

    def write(self, message: Any) -> str:
        """A message as one line, without a line break."""
        return json.dumps({"kind": type(message).__name__, "value": to_plain(message)})

    def read(self, line: str) -> Any:
        """The message of a line from `write`. Raises ProtocolError for any other line."""
        try:
            content = json.loads(line)
            kind = self._kinds[content["kind"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ProtocolError(f"{line[:200]!r} is no message of {', '.join(self._kinds)}: {error!r}") from error
        return from_plain(kind, content["value"])


@contextmanager
def answering(lines: Lines) -> Iterator[tuple[Any, Callable[[Any], None]]]:
    """In a child process: its request, and a function that sends an answer to the pipe that its argument numbers."""
    with os.fdopen(int(sys.argv[1]), "w") as pipe:

        def send(answer: Any) -> None:
            pipe.write(lines.write(answer) + "\n")
            pipe.flush()

        yield lines.read(sys.stdin.readline()), send


@dataclass(frozen=True)
class Fault:
    """Failure of a request: class name and fields of an `orchestrator.errors` error; `traceback` is of user code."""

    kind: str
    message: str
    remedy: str
    unchanged: str
    traceback: str = ""

    @classmethod
    def of(cls, error: OrchestratorError, redact: Callable[[str], str] = str) -> "Fault":
        """The fault that reports this error, without secrets."""
        traceback = error.traceback if isinstance(error, EntrypointError) else ""
        return cls(type(error).__name__, redact(error.message), error.remedy, error.unchanged, redact(traceback))

    def error(self) -> OrchestratorError:
        """The error, of the same class."""
        cls = getattr(errors, self.kind, OrchestratorError)
        error: OrchestratorError = cls(self.message, remedy=self.remedy, unchanged=self.unchanged)
        if isinstance(error, EntrypointError):
            error.traceback = self.traceback
        return error


# -- Requests to a run's model outside of training, and answers --------------------------------------------------------


class Split(StrEnum):
    """A split of a run's own text."""

    VALIDATION = "validation"
    TRAIN = "train"


@dataclass(frozen=True)
class Evaluation:
    """Request for the loss on a text.

    Args:
        run_dir: the run's directory, with its job and tokenizer.
        checkpoint: directory of a complete checkpoint.
        store_dir: the run's prepared data, of which `split` is read; None for another corpus.
        corpus, text_key: a whole source as in the job file; None for the run's store.
        max_rows: maximum number of rows of the job's length.
        dtype: of the model's matrices: fp32, bf16, int8 or int4.
        early_exit: tokens leave at the model's exits by the rule that the checkpoint has.
        max_loss_increase: such a rule is found and kept, with at most this share more loss than that of all layers.
        code: digests of the packages of the job's own code, by their directories; None: those of the job.
    """

    run_dir: str
    checkpoint: str
    store_dir: str | None = None
    split: Split = Split.VALIDATION
    corpus: str | None = None
    text_key: str = "text"
    max_rows: int | None = None
    dtype: str = "fp32"
    early_exit: bool = False
    max_loss_increase: float | None = None
    code: dict[str, str] | None = None


@dataclass(frozen=True)
class EvaluationResult:
    """Loss of rows: mean over `units`, in nats; of text these are target tokens.

    Args:
        unit: what units are, in the plural.
        num_bytes: length of the targets' text in UTF-8; None where they aren't those of a text.
        perplexity: of tokens; None for other units.
        bits_per_byte: of a text, but not of every other row of it; else None.
        metrics: what the task reports, by name.
        mean_layers, loss_of_all_layers: where tokens leave early, the layers that a token runs in the mean, and the
            loss of the same rows without exits.
        exit_rule: the place of a new rule for that.
    """

    rows: int
    units: int
    loss: float
    unit: str = "tokens"
    num_bytes: int | None = None
    perplexity: float | None = None
    bits_per_byte: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    mean_layers: float | None = None
    loss_of_all_layers: float | None = None
    exit_rule: str | None = None


@dataclass(frozen=True)
class Export:
    """Request to write a model that transformers builds, by its own `save_pretrained`, one with adapters, merged, one
    without what was pruned, or one of integers.

    Args:
        run_dir, checkpoint, code: as in `Evaluation`.
        to: an existing directory.
        dtype: fp32, bf16, int8 or int4.
        of_ema: the average of the weights in place of the weights.
    """

    run_dir: str
    checkpoint: str
    to: str
    dtype: str
    of_ema: bool
    code: dict[str, str] | None = None


@dataclass(frozen=True)
class ExportResult:
    """Bytes of weights that were written."""

    num_bytes: int


@dataclass(frozen=True)
class Generation:
    """Request for a continuation of a prompt.

    Args:
        run_dir, checkpoint, dtype, early_exit, code: as in `Evaluation`. The prompt runs all layers.
        max_tokens: maximum length of the continuation, which ends earlier at the end of the document.
        temperature: 0 for the likeliest token each time.
        top_k: sample from this many likeliest tokens; None for all.
        top_p: sample from the likeliest tokens with this total probability, in (0, 1].
        compiled: layers compute the tokens after the prompt compiled.
    """

    run_dir: str
    checkpoint: str
    prompt: str
    max_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    seed: int
    dtype: str = "fp32"
    early_exit: bool = False
    compiled: bool = False
    code: dict[str, str] | None = None


@dataclass(frozen=True)
class GenerationResult:
    """`text` is the continuation without the prompt; `ended`: the document ended before `max_tokens`.

    Args:
        mean_layers: that a token of the continuation has run, where tokens leave early; None where none has.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    ended: bool
    tokens_per_second: float
    mean_layers: float | None = None


@dataclass(frozen=True)
class TextPiece:
    """New text of the continuation."""

    text: str


@dataclass(frozen=True)
class Remark:
    """A progress message or warning for the user."""

    text: str


Request = Evaluation | Generation | Export
Answer = TextPiece | Remark | Fault | EvaluationResult | GenerationResult | ExportResult
MODEL_LINES = Lines(
    Evaluation, Generation, Export, TextPiece, Remark, Fault, EvaluationResult, GenerationResult, ExportResult
)


# -- Messages to and from processes that replay a run's steps ----------------------------------------------------------


@dataclass(frozen=True)
class ReplayOrder:
    """Order to replay the steps up to `last_step`, as `worker` in the plan's world. If the store address has no port,
    this process creates the store and reports its address."""

    worker: str
    job: WorkerJob
    plan: GenerationPlan
    last_step: int


@dataclass(frozen=True)
class Numerics:
    """Properties that determine the bits of this process's results, as JSON."""

    fingerprint: str


PEER_LOST = "PeerLost"  # kind of a Fault that another rank caused
REPLAY_LINES = Lines(ReplayOrder, Numerics, StoreAddress, StepRecord, Fault)


# -- Messages to and from a process that computes the starting model's log-probabilities -------------------------------


@dataclass(frozen=True)
class ReferenceOrder:
    """Order to write a store of pairs again, with log-probabilities.

    Args:
        to, name: directory of the new one, and its name; empty for one by its content.
    """

    job_json: str
    store_dir: str
    to: str
    name: str


@dataclass(frozen=True)
class ReferenceProgress:
    """Share of the pairs that is done."""

    share: float


@dataclass(frozen=True)
class ReferenceStore:
    """Name of the new store, which is complete."""

    name: str


REFERENCE_LINES = Lines(ReferenceOrder, ReferenceProgress, ReferenceStore, Fault)
