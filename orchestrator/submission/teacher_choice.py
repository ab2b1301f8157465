"""What a submission finds out about a job's teacher: its digest, its size, and whether the student can follow it."""

from dataclasses import dataclass
from pathlib import Path

from orchestrator.checkpoint.hf.shapes import listed
from orchestrator.checkpoint.hf.teacher import (
    KEY,
    UNCHANGED,
    check_teacher,
    open_teacher,
    predictions_digest,
    teacher_digest,
)
from orchestrator.data.logit_store import LogitStore
from orchestrator.data.manifest import is_store
from orchestrator.data.prepare.request import load_tokenizer
from orchestrator.data.store import TokenStore
from orchestrator.errors import UsageError
from orchestrator.run_records.run_files import RunFiles, holds_run
from orchestrator.spec.distill import DistillSpec
from orchestrator.spec.job import JobSpec
from orchestrator.spec.model import ModelSpec

REMEDY = "Name a teacher of the same tokenizer, or leave the student's out: the teacher's is taken then."


@dataclass(frozen=True)
class ChosenTeacher:
    """A teacher, found.

    Args:
        directory: of its weights.
        tokenizer: the file, whether or not it exists.
        vocab_size: tokens that it predicts.
    """

    directory: Path
    model: ModelSpec
    tokenizer: Path
    vocab_size: int

    @property
    def tokenizer_digest(self) -> str | None:
        """Of its tokenizer; None if there is none."""
        return load_tokenizer(self.tokenizer).digest if self.tokenizer.exists() else None

    @property
    def num_parameters(self) -> int:
        params, _ = listed(self.model, self.vocab_size)
        return sum(param.numel for param in params)


def with_teacher(spec: JobSpec) -> JobSpec:
    """The job with digest, size, vocabulary and, unless it has another one, tokenizer of its teacher.

    Raises:
        UsageError: the teacher can't be found or isn't one; it has another vocabulary or other hidden states than the
            student; its predictions are of other rows than the job's; or its weights are not those of the digest that
            the job has.
        CheckpointCorrupt, StoreCorrupt: its files are not complete, or damaged.
        DataError: a tokenizer, or predictions, can't be read.
    """
    if spec.distill is None:
        return spec
    if spec.distill.teacher is None:
        return _with_predictions(spec, spec.distill)
    chosen = chosen_teacher(Path(spec.distill.teacher))
    _check_vocabulary(spec, KEY, chosen.directory, chosen.vocab_size)
    if spec.distill.hidden_weight and spec.model.hidden_size != chosen.model.hidden_size:
        raise UsageError(
            f"distill.hidden_weight is {spec.distill.hidden_weight:g}, and hidden states differ in size: "
            f"{spec.model.hidden_size} (model.hidden_size) and {chosen.model.hidden_size} in {KEY} {chosen.directory}",
            remedy="Set model.hidden_size to the teacher's, or leave distill.hidden_weight out.",
            unchanged=UNCHANGED,
        )
    found = {"teacher": str(chosen.directory), "teacher_parameters": chosen.num_parameters}
    data = spec.data.model_copy(update={"tokenizer": _tokenizer(spec, chosen)})
    distill = spec.distill.model_copy(update=found)
    return _described(spec, distill, chosen.vocab_size).model_copy(update={"data": data})


def _tokenizer(spec: JobSpec, chosen: ChosenTeacher) -> str | None:
    """The tokenizer that the job is to name: the teacher's, unless it has one already, which must be the same."""
    named, source, digest = spec.data.tokenizer, Path(spec.data.source), chosen.tokenizer_digest
    if named is not None:
        has, mine = f"{named} (data.tokenizer)", load_tokenizer(Path(named)).digest
    elif is_store(source):
        has, mine = f"that of {source} (data.source)", TokenStore.open(source).manifest.tokenizer_digest
    elif digest is None:
        raise UsageError(
            f"{KEY} {chosen.directory} has no {chosen.tokenizer.name}, which would turn data.source into its tokens",
            remedy="Save its tokenizer there, or name the file: data.tokenizer.",
            unchanged=UNCHANGED,
        )
    else:
        return str(chosen.tokenizer)
    if digest not in (None, mine):
        raise UsageError(
            f"the tokenizers of teacher and student differ: {chosen.tokenizer} and {has}",
            remedy=REMEDY,
            unchanged=UNCHANGED,
        )
    return named


def _with_predictions(spec: JobSpec, distill: DistillSpec) -> JobSpec:
    directory = Path(distill.directory).expanduser().absolute()
    options = LogitStore.open(directory).manifest.options
    _check_vocabulary(spec, "distill.logits", directory, options.vocab_size)
    wanted: dict[str, tuple[object, object]] = {
        "train.sequence_length": (spec.train.sequence_length, options.sequence_length),
        "data.isolate_documents": (spec.data.isolate_documents, options.isolate_documents),
        "distill.temperature": (distill.temperature, options.temperature),
    }
    if is_store(Path(spec.data.source)):  # else the store that the job makes is compared
        wanted["the digest of data.source"] = (TokenStore.open(spec.data.source).digest[:12], options.store[:12])
    differing = [f"{key} is {mine}, there it is {theirs}" for key, (mine, theirs) in wanted.items() if mine != theirs]
    if differing:
        raise UsageError(
            f"distill.logits {directory} has the predictions for other rows: {'; '.join(differing)}",
            remedy="Set these keys as they are there, or compute others: orchestrator data teach.",
            unchanged=UNCHANGED,
        )
    return _described(spec, distill.model_copy(update={"logits": str(directory)}), options.vocab_size)


def _described(spec: JobSpec, distill: DistillSpec, vocab_size: int) -> JobSpec:
    """The job with the digest of its teacher, whose directory is known."""
    check_teacher(distill)
    digest_of = teacher_digest if distill.logits is None else predictions_digest
    digest = distill.teacher_sha256 or digest_of(Path(distill.directory))
    return spec.model_copy(
        update={
            "distill": distill.model_copy(update={"teacher_sha256": digest}),
            "model": spec.model.model_copy(update={"vocab_size": vocab_size}),
        }
    )


def chosen_teacher(place: Path, key: str = KEY) -> ChosenTeacher:
    """The teacher in a directory: of a run its newest checkpoint. `key` names it in errors. Raises as
    `with_teacher`."""
    directory = place.expanduser().absolute()
    if holds_run(directory):
        newest = RunFiles(directory).choose_checkpoint()
        if newest is None:
            raise UsageError(
                f"{key} {directory} is a run that has no checkpoint",
                remedy="Let it write one: orchestrator checkpoint now RUN.",
                unchanged=UNCHANGED,
            )
        directory = Path(str(newest))
    teacher = open_teacher(directory, key)
    vocab_size = teacher.model.vocab_size or load_tokenizer(teacher.tokenizer).vocab_size
    return ChosenTeacher(directory, teacher.model, teacher.tokenizer, vocab_size)


def _check_vocabulary(spec: JobSpec, key: str, directory: Path, vocab_size: int) -> None:
    """Both must give their logits to the same tokens."""
    if spec.model.vocab_size not in (None, vocab_size):
        raise UsageError(
            f"{key} {directory} has a vocabulary of {vocab_size} tokens, and the student one of "
            f"{spec.model.vocab_size} (model.vocab_size)",
            remedy=REMEDY,
            unchanged=UNCHANGED,
        )
