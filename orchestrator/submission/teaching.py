"""A teacher's predictions for a token store, computed once on all nodes of a cluster."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from orchestrator.checkpoint.hf.teacher import teacher_digest
from orchestrator.data.logit_store import FORMAT, PARTS, LogitManifest, LogitOptions, LogitStore, file_of
from orchestrator.data.manifest import MANIFEST, SPLITS, Split, digest_file
from orchestrator.data.prepare.block_cache import Parts
from orchestrator.data.store import TokenStore
from orchestrator.errors import DataError, DataNotWritten, UsageError
from orchestrator.storage.atomic import flush
from orchestrator.submission.teacher_choice import ChosenTeacher, chosen_teacher

Spread = Callable[[Callable[[str], str], Sequence[str]], Iterable[str]]  # `map` is one too
Progress = Callable[[str, float], None]
MODULE = "orchestrator.worker.whole_models.teach"
OPTION = "--teacher"
BLOCK_TOKENS = 1 << 16  # of a task: some seconds with a small teacher on one core
TASK_BYTES = 1 << 30  # of a task's process beside its teacher: torch, rows and logits of a part of a block
UNCHANGED = "No predictions were written; what is done is kept."


@dataclass(frozen=True)
class TeachRequest:
    """What is to be predicted.

    Args:
        store: directory of a token store.
        teacher: as `distill.teacher` of a job file.
        out: directory of the results, each named by what it depends on.
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


@dataclass(frozen=True)
class TeachPlan:
    """A request that can be carried out.

    Args:
        store: directory of the token store.
        num_rows: of its splits.
        target: directory of the result, whether or not it is there.
    """

    options: LogitOptions
    store: Path
    teacher: ChosenTeacher
    num_rows: dict[Split, int]
    target: Path

    @property
    def is_done(self) -> bool:
        """Whether the predictions are there."""
        return (self.target / MANIFEST).exists()

    @property
    def num_bytes(self) -> int:
        """Size of the result."""
        return sum(self.options.num_bytes(part, rows) for part in PARTS for rows in self.num_rows.values())

    @property
    def task_bytes(self) -> int:
        """Memory of a task's process: each holds the whole teacher, in fp32."""
        return TASK_BYTES + 4 * self.teacher.num_parameters

    @property
    def blocks(self) -> list[tuple[Split, int, int]]:
        """Rows [start, stop) of a split, for each task."""
        size = max(1, BLOCK_TOKENS // self.options.sequence_length)
        return [
            (split, start, min(start + size, rows))
            for split, rows in self.num_rows.items()
            for start in range(0, rows, size)
        ]


def plan_teaching(request: TeachRequest) -> TeachPlan:
    """What a request amounts to. Nothing is written.

    Raises:
        UsageError: the teacher can't be found, isn't one, or has another vocabulary than the store.
        DataError: there is no store, it has no whole row, or `top_k` is too large.
        CheckpointCorrupt, StoreCorrupt: the teacher or the store is damaged.
    """
    store = TokenStore.open(request.store)
    teacher = chosen_teacher(request.teacher, OPTION)
    remedy = "Prepare the store with the teacher's tokenizer: data prepare --tokenizer."
    if teacher.vocab_size < store.vocab_size:
        raise _refused(
            f"{OPTION} {teacher.directory} has a vocabulary of {teacher.vocab_size} tokens, and {request.store} one of "
            f"{store.vocab_size}",
            remedy,
        )
    if teacher.tokenizer_digest not in (None, store.manifest.tokenizer_digest):
        raise _refused(f"{request.store} was made with another tokenizer than {teacher.tokenizer}", remedy)
    if request.top_k >= teacher.vocab_size:
        raise _refused(
            f"--top-k is {request.top_k}, and the vocabulary has {teacher.vocab_size} tokens: there would be no others",
            "Keep fewer.",
        )
    if not store.num_rows("train", request.sequence_length):
        raise _refused(
            f"{request.store} has {store.num_tokens('train')} tokens to train on: no row of {request.sequence_length}",
            "Make --sequence-length smaller.",
        )
    options = LogitOptions(
        store=store.digest,
        teacher_sha256=teacher_digest(teacher.directory),
        sequence_length=request.sequence_length,
        isolate_documents=request.isolate_documents,
        top_k=request.top_k,
        temperature=request.temperature,
        vocab_size=teacher.vocab_size,
    )
    num_rows = {split: store.num_rows(split, request.sequence_length) for split in SPLITS}
    return TeachPlan(options, request.store, teacher, num_rows, request.out / options.name)


def teach(plan: TeachPlan, spread: Spread, progress: Progress) -> LogitStore:
    """The predictions, which are computed unless they are there. Ended, it goes on where it was with the same request.

    Args:
        spread: runs the tasks, in any order.
        progress: called with a stage and its finished fraction.

    Raises:
        DataError: another process computes them now.
        DataNotWritten: files can't be written.
        OrchestratorError: that of a task.
    """
    if plan.is_done:
        return LogitStore.open(plan.target)
    try:
        plan.target.parent.mkdir(parents=True, exist_ok=True)
        with Parts.held(plan.target) as parts:
            if not plan.is_done:  # by another process meanwhile
                _compute(plan, parts.directory, spread, progress)
            parts.remove()
    except OSError as error:
        raise DataNotWritten(
            f"predictions of {plan.num_bytes / 1e6:,.0f} MB can't be written to {plan.target.parent}: {error}",
            remedy="Make room and the directory writable, or choose another one: --out.",
            unchanged=UNCHANGED,
        ) from error
    progress("done", 1.0)
    return LogitStore.open(plan.target)


def _compute(plan: TeachPlan, parts: Path, spread: Spread, progress: Progress) -> None:
    """Write the files, marking each block that is finished, and publish them by a rename."""
    if plan.target.exists():
        raise DataError(
            f"{plan.target} exists and has no {MANIFEST}",
            remedy="Move it away, or choose another directory: --out.",
            unchanged="Nothing was written.",
        )
    files, done = parts / "files", parts / "done"
    for directory in (files, done):
        directory.mkdir(exist_ok=True)
    new = [_allocated(files / file_of(split, part), plan, split, part) for split in SPLITS for part in PARTS]
    if any(new):
        for marker in done.iterdir():  # of blocks in files that aren't there
            marker.unlink()
    left = [block for block in plan.blocks if not (done / _name(*block)).exists()]
    given = {
        "store": str(plan.store),
        "teacher": str(plan.teacher.directory),
        "to": str(files),
        "options_json": plan.options.model_dump_json(),
    }
    tasks = [
        json.dumps(given | {"split": split, "start": start, "stop": stop, "marker": str(done / _name(*block))})
        for block in left
        for split, start, stop in [block]
    ]
    num_blocks = len(plan.blocks)
    progress("teaching", 1 - len(left) / num_blocks)
    for number, _ in enumerate(spread(run_block, tasks), num_blocks - len(left) + 1):
        progress("teaching", number / num_blocks)
    manifest = LogitManifest(
        format=FORMAT,
        options=plan.options,
        teacher=str(plan.teacher.directory),
        num_rows=plan.num_rows,
        files={(name := file_of(split, part)): digest_file(files / name) for split in SPLITS for part in PARTS},
    )
    (files / MANIFEST).write_text(manifest.model_dump_json(indent=1))
    flush(files / MANIFEST)
    files.rename(plan.target)
    flush(plan.target.parent)


def run_block(task: str) -> str:
    """A task, on any node. The module is named, as control code doesn't import torch."""
    given = json.loads(task)
    marker = Path(given.pop("marker"))
    rows: str = import_module(MODULE).teach_block(json.dumps(given))
    marker.touch()
    return rows


def _name(split: Split, start: int, stop: int) -> str:
    return f"{split}-{start}-{stop}"


def _allocated(path: Path, plan: TeachPlan, split: Split, part: str) -> bool:
    """Give a file its size and its room on disk, unless an earlier attempt has. Returns whether it was so."""
    num_bytes = plan.options.num_bytes(part, plan.num_rows[split])
    with path.open("ab") as file:
        if file.tell() == num_bytes:
            return False
        file.truncate(0)
        if num_bytes:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
    return True


def _refused(reason: str, remedy: str) -> UsageError:
    return UsageError(reason, remedy=remedy, unchanged="Nothing was written.")
