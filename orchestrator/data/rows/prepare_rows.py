"""Preparation of a job's rows as a store: of chats, of a folder of arrays, or of a user's own data sets.

Files are read twice, as a row's split needs the ids of all, and once more for a tokenizer that is trained; rows of a
user once. They are written to a store that is named by its content.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.bucket_store import only_one
from orchestrator.data.holdout import Holdout
from orchestrator.data.manifest import SPLITS, Split
from orchestrator.data.prepare.request import load_tokenizer
from orchestrator.data.rows.chat_rows import ChatEncoder, check_chat, text_of
from orchestrator.data.rows.chat_template import END, START, ChatTemplate
from orchestrator.data.rows.chat_tokenizer import SAVED, ChatTokenizer, saved_template, template_beside
from orchestrator.data.rows.row_files import ALL, FileRow, read_rows
from orchestrator.data.rows.row_store import RowStore
from orchestrator.data.rows.row_writer import RowWriter, arrays_of, new_rows, rows_key
from orchestrator.data.rows.user_rows import UserRows, units_of
from orchestrator.data.tokenizer import TextTokenizer
from orchestrator.errors import DataError
from orchestrator.spec.job import JobSpec
from orchestrator.spec.task import CLASSIFICATION, DPO, PREFERENCE, SFT

Progress = Callable[[str, float], None]
TOLD_EVERY = 256  # rows
FIRST_CHATS = 100  # that are checked before a job is submitted


def prepare_rows(job: JobSpec, directory: Path, progress: Progress | None = None) -> RowStore:
    """The store of a job's rows below `directory`, written unless it is there.

    Args:
        progress: called with a stage ("tokenizer", "encoding", "reading", "done") and its finished fraction.

    Raises:
        DataError: no such source, a row that can't be used, of which the message has file and line, or too few rows.
        EntrypointError: the user's code raises, or gives no rows.
    """
    report = progress or (lambda stage, fraction: None)
    directory.mkdir(parents=True, exist_ok=True)
    with only_one(directory / ".rows.lock"):  # of processes that may prepare the same
        store = _chats(job, directory, report) if job.has_chats else _arrays(job, directory, report)
    check_enough_rows(job, store)
    report("done", 1.0)
    return store


def check_enough_rows(job: JobSpec, store: RowStore) -> None:
    """Raises DataError for a store with less than one global batch, or without validation rows that the job needs."""
    wanted: tuple[tuple[Split, int, str], ...] = (
        ("train", job.train.global_batch_size, "one global batch"),
        ("validation", int(job.eval.every is not None), "validation"),
    )
    for split, needed, purpose in wanted:
        if (found := store.num_rows(split)) < needed:
            raise DataError(
                f"the {split} split has {found} rows, and {purpose} needs {needed}",
                remedy="Add rows, or make train.global_batch_size smaller, or set eval.every to null.",
                unchanged="Nothing was started.",
            )


def check_outputs(job: JobSpec, needed: int) -> None:
    """Raises DataError if the model's last matrix has fewer rows than there are tokens, or classes."""
    found = job.model.vocab_size
    if found is not None and found < needed:
        what = "tokens" if job.has_chats else "classes"
        raise DataError(
            f"the data have {needed} {what}, the model has rows for {found} only (model.vocab_size)",
            remedy="Leave model.vocab_size out, or make it larger.",
            unchanged="Nothing was started.",
        )


def first_rows(job: JobSpec, most: int) -> list[dict[str, NDArray[np.generic]]]:
    """The first training rows of a job whose rows are arrays, before they are prepared. Raises as `prepare_rows`."""
    checked, found = _Classified(job), []
    rows = UserRows(job.data, ("train",)).rows("train", most) if job.data.entrypoint is not None else _of_file(job)
    for (where, row), _ in zip(rows, range(most), strict=False):
        checked.check(row, where)
        units_of(job.task, row, where)
        found.append(arrays_of(row, where))
    return found


def check_first_chats(job: JobSpec, most: int = FIRST_CHATS) -> None:
    """Check the template, and the first chats with it. Raises as `prepare_rows`."""
    template = _template(job)[0]
    for _, row in zip(range(most), read_rows(job.data.source), strict=False):
        with _at(row):
            check_chat(row.values, template, job.data_format == PREFERENCE, job.task.assistant_only_loss)


# -- arrays ------------------------------------------------------------------------------------------------------------


def _arrays(job: JobSpec, directory: Path, report: Progress) -> RowStore:
    made_of = {"source": job.data.entrypoint or job.data.source, "options": job.data.options}
    checked = _Classified(job)
    with new_rows(directory) as (writer, named):
        for split, where, row, share in _split_rows(job):
            checked.check(row, where)
            writer.add(split, row, where, units_of(job.task, row, where))
            report("reading", share)
        writer.finish(str(made_of["source"]), made_of, checked.num_classes)
        named.append(directory / _name_of(writer))
    return RowStore.open(named[0])


def _split_rows(job: JobSpec) -> Iterator[tuple[Split, str, Mapping[str, Any], float]]:
    """Every row with its split, where it is, and the share that has been read."""
    if job.data.entrypoint is not None:
        found = UserRows(job.data)
        total, done = max(sum(found.num_rows.values()), 1), 0
        for split in SPLITS:
            for where, row in found.rows(split):
                done += 1
                yield split, where, row, done / total
        return
    held_out = _held_out(job.data.holdout, read_rows(job.data.source, ()))
    for number, (where, row) in enumerate(_of_file(job)):
        yield _split(held_out[number]), where, row, (number + 1) / len(held_out)


def _of_file(job: JobSpec) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a source, each with where it is, and the columns that the task reads."""
    wanted = (job.task.inputs, job.task.labels) if job.task.entrypoint is None else ALL
    return ((row.where, row.values) for row in read_rows(job.data.source, wanted))


class _Classified:
    """Checks of a classification's rows, and their classes; of other tasks' rows nothing."""

    def __init__(self, job: JobSpec) -> None:
        task = job.task
        self._is_wanted = task.entrypoint is None and task.name == CLASSIFICATION
        self._columns, self._given = (task.inputs, task.labels), task.num_classes
        self._most = -1
        self._shape: tuple[int, ...] | None = None  # of all inputs

    @property
    def num_classes(self) -> int:
        """As many as the job gives, or as the labels show; 0 where there are none."""
        return self._given or self._most + 1

    def check(self, row: Mapping[str, Any], where: str) -> None:
        if not self._is_wanted or not isinstance(row, Mapping):
            return
        for name in self._columns:
            if name not in row:
                raise _refused(
                    f"{where} has no {name!r}; it has {', '.join(map(repr, row))}",
                    "Name the columns in task.inputs and task.labels.",
                )
        self._check_shape(arrays_of({self._columns[0]: row[self._columns[0]]}, where)[self._columns[0]].shape, where)
        label = np.asarray(row[self._columns[1]])
        if label.shape != () or label.dtype.kind not in "iu" or label < 0 or label >= (self._given or np.inf):
            classes = f"below {self._given}" if self._given else "from 0"
            raise _refused(
                f"the label of {where} is {row[self._columns[1]]!r}; it must be a whole number {classes}",
                "Correct the rows, or task.num_classes.",
            )
        self._most = max(self._most, int(label))

    def _check_shape(self, shape: tuple[int, ...], where: str) -> None:
        if self._shape not in (None, shape):
            raise _refused(
                f"{self._columns[0]} of {where} has the shape {shape}, and that of the rows before it {self._shape}",
                "Give all rows one shape, or collate them by a task of your own (docs/tasks.md).",
            )
        self._shape = shape


# -- chats -------------------------------------------------------------------------------------------------------------


def _chats(job: JobSpec, directory: Path, report: Progress) -> RowStore:
    data, task = job.data, job.task
    template, source, tokens = _template(job)
    report("reading", 0.0)
    held_out = _held_out(data.holdout, read_rows(data.source))
    given = data.tokenizer
    tokenizer = _learned(job, template, held_out, report) if given is None else load_tokenizer(Path(given))
    encoder = ChatEncoder(template, ChatTokenizer(tokenizer), job.train.sequence_length, task.assistant_only_loss)
    kind = DPO if job.data_format == PREFERENCE else SFT  # that reads such rows
    made_of = {"source": data.source, "task": kind, "template": hashlib.sha256(source.encode()).hexdigest()}
    made_of["tokenizer"] = tokenizer.digest
    with new_rows(directory) as (writer, named):
        for number, row in enumerate(read_rows(data.source)):
            with _at(row):
                encoded = encoder.pair(row.values) if kind == DPO else encoder.chat(row.values)
            units = 1 if kind == DPO else encoded.num_targets
            split = _split(held_out[number])
            writer.add(split, encoded.arrays, row.where, units, encoded.num_tokens)
            writer.count_cut(split, encoded.is_cut)
            if number % TOLD_EVERY == 0:
                report("encoding", number / len(held_out))
        writer.add_file(SAVED, saved_template(source, tokens))
        writer.finish(data.source, made_of, tokenizer.vocab_size, tokenizer)
        named.append(directory / _name_of(writer))
    return RowStore.open(named[0])


def _template(job: JobSpec) -> tuple[ChatTemplate, str, dict[str, str]]:
    """The job's template, its source, and the special tokens that it knows."""
    tokenizer, given = job.data.tokenizer, job.data.chat_template
    source, tokens = template_beside(
        None if tokenizer is None else Path(tokenizer), None if given is None else Path(given)
    )
    return ChatTemplate(source, tokens), source, tokens


@contextmanager
def _at(row: FileRow) -> Iterator[None]:
    """Name the row in errors that are raised meanwhile."""
    try:
        yield
    except DataError as error:
        message = f"{row.where}: {error.message}"
        raise DataError(message, remedy=error.remedy, unchanged=error.unchanged) from error


def _learned(job: JobSpec, template: ChatTemplate, held_out: bytearray, report: Progress) -> TextTokenizer:
    """A tokenizer that is trained on the text of the chats that are trained on."""
    report("tokenizer", 0.0)

    def texts() -> Iterator[str]:
        for number, row in enumerate(read_rows(job.data.source)):
            if not held_out[number]:
                with _at(row):
                    yield text_of(row.values, template)

    return TextTokenizer.train(texts(), job.data.vocab_size, (START, END))


def _held_out(holdout: float, rows: Iterator[FileRow]) -> bytearray:
    """1 for each row that is held out, else 0. Raises DataError for fewer than two rows."""
    found, count = Holdout(holdout), 0
    for row in rows:
        found.add(row.id)
        count += 1
    if count < 2:
        raise _refused(f"there is {count} row; one is needed to train and one to validate on", "Add rows.")
    return found.finished()


def _split(is_held_out: int) -> Split:
    return "validation" if is_held_out else "train"


def _name_of(writer: RowWriter) -> str:
    return rows_key({"content": writer.digest})


def _refused(message: str, remedy: str) -> DataError:
    return DataError(message, remedy=remedy, unchanged="No store was written.")
