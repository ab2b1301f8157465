"""What is asked of a run's model outside of training: frozen values that cross to a process with torch."""

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from orchestrator.errors import ProtocolError
from orchestrator.protocol.codec import from_plain, to_plain
from orchestrator.protocol.messages import GenerationPlan, StepRecord, StoreAddress, WorkerJob

# -- Messages to and from a process of one's own: a line of JSON each, on its stdin and stdout -------------------------


class Lines:
    """Writes and reads messages of some dataclasses."""

    def __init__(self, *kinds: type[Any]) -> None:
        self._kinds = {kind.__name__: kind for kind in kinds}

    def write(self, message: Any) -> str:
        """A message as one line, without its end."""
        return json.dumps({"kind": type(message).__name__, "value": to_plain(message)})

    def read(self, line: str) -> Any:
        """The message that `write` wrote. Raises ProtocolError if it is none."""
        try:
            content = json.loads(line)
            kind = self._kinds[content["kind"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ProtocolError(f"{line[:200]!r} is no message of {', '.join(self._kinds)}: {error!r}") from error
        return from_plain(kind, content["value"])


# -- What is asked of a run's model outside of training: frozen values that cross to a process with torch --------------


class Split(StrEnum):
    """Of a run's own text."""

    VALIDATION = "validation"
    TRAIN = "train"


@dataclass(frozen=True)
class Evaluation:
    """The loss on a text.

    Args:
        run_dir: the run's directory: its job and tokenizer.
        checkpoint: directory of a complete checkpoint.
        store_dir: the run's token store, of which `split` is read; None for another corpus.
        corpus, text_key: a source as in the job file, all of it; None for the run's store.
        max_rows: rows of the job's length, at most.
    """

    run_dir: str
    checkpoint: str
    store_dir: str | None = None
    split: Split = Split.VALIDATION
    corpus: str | None = None
    text_key: str = "text"
    max_rows: int | None = None


@dataclass(frozen=True)
class EvaluationResult:
    """Losses are means over `tokens` targets, in nats; `num_bytes` is their text's length in UTF-8."""

    rows: int
    tokens: int
    num_bytes: int
    loss: float
    perplexity: float
    bits_per_byte: float


@dataclass(frozen=True)
class Generation:
    """A continuation of a prompt.

    Args:
        run_dir, checkpoint: as in `Evaluation`.
        max_tokens: of the continuation, at most; it ends before at the border of the document.
        temperature: 0 for the likeliest token each time.
        top_k: choose among so many; None for all.
        top_p: choose among the likeliest that hold this share, in (0, 1].
    """

    run_dir: str
    checkpoint: str
    prompt: str
    max_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    seed: int


@dataclass(frozen=True)
class GenerationResult:
    """`text` is the continuation alone; `ended` whether the document ended before `max_tokens`."""

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    ended: bool
    tokens_per_second: float


@dataclass(frozen=True)
class Piece:
    """Text that the continuation has grown by."""

    text: str


@dataclass(frozen=True)
class Remark:
    """What the user should know meanwhile."""

    text: str


@dataclass(frozen=True)
class Fault:
    """How it ended instead: an error of `orchestrator.errors`, by its class, with the traceback of a user's code."""

    kind: str
    message: str
    remedy: str
    unchanged: str
    traceback: str = ""


Request = Evaluation | Generation
Answer = Piece | Remark | Fault | EvaluationResult | GenerationResult
MODEL_LINES = Lines(Evaluation, Generation, Piece, Remark, Fault, EvaluationResult, GenerationResult)


# -- What the processes that do a run's steps again are told, and what they answer -------------------------------------


@dataclass(frozen=True)
class ReplayOrder:
    """Do the steps up to `last_step` again, as `worker` in the plan's world. A store address without a port: make the
    store, and say where it listens."""

    worker: str
    job: WorkerJob
    plan: GenerationPlan
    last_step: int


@dataclass(frozen=True)
class Numerics:
    """What decides the bits of this process's results, as JSON."""

    fingerprint: str


PEER_LOST = "PeerLost"  # kind of a Fault that another rank is to blame for
REPLAY_LINES = Lines(ReplayOrder, Numerics, StoreAddress, StepRecord, Fault)
