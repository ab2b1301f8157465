"""What is asked of a run's model outside of training: frozen values that cross to a process with torch."""

from dataclasses import dataclass
from enum import StrEnum

from orchestrator.protocol.lines import Lines


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
LINES = Lines(Evaluation, Generation, Piece, Remark, Fault, EvaluationResult, GenerationResult)
