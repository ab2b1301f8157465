"""A teacher's predictions for a token store, computed once on all nodes of a cluster."""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from orchestrator.checkpoint.hf.teacher import KEY, teacher_digest
from orchestrator.data.manifest import MANIFEST, SPLITS, Split, digest_file
from orchestrator.data.store import TokenStore
from orchestrator.data.taught_store import (
    FORMAT,
    PARTS,
    TaughtManifest,
    TaughtOptions,
    TaughtStore,
    file_of,
)
from orchestrator.errors import DataError, UsageError
from orchestrator.storage.atomic import flush
from orchestrator.submission.teacher_choice import chosen_teacher

Spread = Callable[[Callable[[str], str], Sequence[str]], Iterable[str]]  # `map` is one too
Progress = Callable[[str, float], None]
MODULE = "orchestrator.worker.whole_models.teach"
BLOCK_TOKENS = 1 << 16  # of a task: some seconds with a small teacher on one core
DONE = "done"  # folder of markers of finished blocks
UNCHANGED = "No predictions were written."


@dataclass(frozen=True)
class TeachRequest:
    """What is to be predicted.

    Args:
        store: directory of a token store.
        teacher: as `distill.teacher` of a job file.
        out: directory of the results, each named by its content.
        sequence_length, isolate_documents: of the rows, as a job has them.
        top_k: tokens of which log-probabilities are kept.
    """

    store: Path
    teacher: Path
    out: Path
    sequence_length: int
    isolate_documents: bool
    top_k: int
    temperature: float


def teach(request: TeachRequest, spread: Spread, progress: Progress) -> tuple[TaughtStore, bool]:
    """The predictions, and whether they were there already. Ended, it goes on where it was with the same request.

    Args:
        spread: runs the tasks, in any order.
        progress: called with a stage and its finished fraction.

    Raises:
        UsageError: the teacher can't be found, isn't one, or has another vocabulary than the store.
        DataError: there is no store, it has no whole row, or `top_k` is too large.
        CheckpointCorrupt, StoreCorrupt: the teacher or the store is damaged.
    """
    options, directory = checked(request)
    target = request.out / options.name
    if is_there(request, options):
        return TaughtStore.open(target), True
    store = TokenStore.open(request.store)
    num_rows = {split: store.num_rows(split, options.sequence_length) for split in SPLITS}
    partial = request.out / f".{options.name}.partial"
    (partial / DONE).mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        for part in PARTS:
            _allocate(partial / file_of(split, part), options, part, num_rows[split])
    blocks = [block for split in SPLITS for block in _blocks(split, num_rows[split], options.sequence_length)]
    left = [block for block in blocks if not (partial / DONE / _name(*block)).exists()]
    given = {
        "store": str(request.store),
        "teacher": str(directory),
        "to": str(partial),
        "options_json": options.model_dump_json(),
    }
    tasks = [
        json.dumps(given | {"split": split, "start": start, "stop": stop, "done": _name(split, start, stop)})
        for split, start, stop in left
    ]
    progress("teaching", 1 - len(left) / max(len(blocks), 1))
    for number, _ in enumerate(spread(run_block, tasks), len(blocks) - len(left) + 1):
        progress("teaching", number / len(blocks))
    shutil.rmtree(partial / DONE)
    names = [file_of(split, part) for split in SPLITS for part in PARTS]
    files = {name: digest_file(partial / name) for name in names}
    manifest = TaughtManifest(format=FORMAT, options=options, teacher=str(directory), num_rows=num_rows, files=files)
    (partial / MANIFEST).write_text(manifest.model_dump_json(indent=1))
    flush(partial / MANIFEST)
    partial.rename(target)
    flush(request.out)
    progress("done", 1.0)
    return TaughtStore.open(target), False


def checked(request: TeachRequest) -> tuple[TaughtOptions, Path]:
    """What the result depends on, and the directory of the teacher's weights. Raises as `teach`."""
    store = TokenStore.open(request.store)
    chosen = chosen_teacher(request.teacher)
    directory, vocab_size = chosen.directory, chosen.vocab_size
    if vocab_size < store.vocab_size:
        raise UsageError(
            f"{KEY} {directory} has a vocabulary of {vocab_size} tokens, and {request.store} one of {store.vocab_size}",
            remedy="Prepare the store with the teacher's tokenizer: data prepare --tokenizer.",
            unchanged=UNCHANGED,
        )
    if chosen.tokenizer_digest not in (None, store.manifest.tokenizer_digest):
        raise UsageError(
            f"{request.store} was made with another tokenizer than {chosen.tokenizer}",
            remedy="Prepare the store with the teacher's tokenizer: data prepare --tokenizer.",
            unchanged=UNCHANGED,
        )
    if request.top_k >= vocab_size:
        raise DataError(
            f"--top-k is {request.top_k}, and the vocabulary has {vocab_size} tokens: there would be no others",
            remedy="Keep fewer.",
            unchanged=UNCHANGED,
        )
    if not store.num_rows("train", request.sequence_length):
        raise DataError(
            f"{request.store} has {store.num_tokens('train')} tokens to train on: no row of {request.sequence_length}",
            remedy="Make --sequence-length smaller.",
            unchanged=UNCHANGED,
        )
    options = TaughtOptions(
        store=store.digest,
        teacher_sha256=teacher_digest(directory),
        sequence_length=request.sequence_length,
        isolate_documents=request.isolate_documents,
        top_k=request.top_k,
        temperature=request.temperature,
        vocab_size=vocab_size,
    )
    return options, directory


def is_there(request: TeachRequest, options: TaughtOptions) -> bool:
    """Whether the predictions were computed before."""
    return (request.out / options.name / MANIFEST).exists()


def num_bytes(request: TeachRequest, options: TaughtOptions) -> int:
    """Size of the result."""
    store = TokenStore.open(request.store)
    rows = [store.num_rows(split, options.sequence_length) for split in SPLITS]
    return sum(options.num_bytes(part, number) for part in PARTS for number in rows)


def run_block(task: str) -> str:
    """A task, on any node. The module is named, as control code doesn't import torch."""
    given = json.loads(task)
    marker = Path(given["to"]) / DONE / given.pop("done")
    rows: str = import_module(MODULE).teach_block(json.dumps(given))
    marker.touch()
    return rows


def _blocks(split: Split, num_rows: int, length: int) -> list[tuple[Split, int, int]]:
    size = max(1, BLOCK_TOKENS // length)
    return [(split, start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def _name(split: Split, start: int, stop: int) -> str:
    return f"{split}-{start}-{stop}"


def _allocate(path: Path, options: TaughtOptions, part: str, num_rows: int) -> None:
    """Give a file its size; one that an earlier attempt left has it already."""
    with path.open("ab") as file:
        if file.tell() != (num_bytes := options.num_bytes(part, num_rows)):
            file.truncate(num_bytes)
