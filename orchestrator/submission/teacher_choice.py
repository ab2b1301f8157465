"""What a submission finds out about a job's teacher: its digest, its size, and whether the student can follow it."""

from pathlib import Path

from orchestrator.checkpoint.hf.shapes import listed
from orchestrator.checkpoint.hf.teacher import KEY, UNCHANGED, Teacher, check_teacher, open_teacher, teacher_digest
from orchestrator.data.prepare.request import load_tokenizer
from orchestrator.errors import UsageError
from orchestrator.run_records.run_files import RunFiles, holds_run
from orchestrator.spec.job import JobSpec
from orchestrator.spec.model import ModelSpec


def with_teacher(spec: JobSpec) -> JobSpec:
    """The job with digest, size, vocabulary and, unless it names another one, tokenizer of its teacher.

    Raises:
        UsageError: the teacher can't be found or isn't one; it has another vocabulary or other hidden states than the
            student; or its weights are not those of the digest that the job has.
        CheckpointCorrupt: its files are not complete, or damaged.
        DataError: a tokenizer can't be read.
    """
    if spec.distill is None:
        return spec
    directory = _directory(Path(spec.distill.teacher).expanduser().absolute())
    teacher = open_teacher(directory)
    vocab_size = teacher.model.vocab_size or load_tokenizer(teacher.tokenizer).vocab_size
    _check_vocabulary(spec, directory, teacher, vocab_size)
    if spec.distill.hidden_weight and spec.model.hidden_size != teacher.model.hidden_size:
        raise UsageError(
            f"distill.hidden_weight is {spec.distill.hidden_weight:g}, and hidden states differ in size: "
            f"{spec.model.hidden_size} (model.hidden_size) and {teacher.model.hidden_size} in {KEY} {directory}",
            remedy="Set model.hidden_size to the teacher's, or leave distill.hidden_weight out.",
            unchanged=UNCHANGED,
        )
    distill = spec.distill.model_copy(update={"teacher": str(directory)})
    check_teacher(distill)
    found = {
        "teacher_sha256": distill.teacher_sha256 or teacher_digest(directory),
        "teacher_parameters": _num_parameters(teacher.model, vocab_size),
    }
    return spec.model_copy(
        update={
            "distill": distill.model_copy(update=found),
            "model": spec.model.model_copy(update={"vocab_size": vocab_size}),
            "data": spec.data.model_copy(update={"tokenizer": spec.data.tokenizer or str(teacher.tokenizer)}),
        }
    )


def _directory(place: Path) -> Path:
    """The directory of the teacher's weights: of a run that of its newest checkpoint."""
    if not holds_run(place):
        return place
    newest = RunFiles(place).choose_checkpoint()
    if newest is None:
        raise UsageError(
            f"{KEY} {place} is a run that has no checkpoint",
            remedy="Let it write one: orchestrator checkpoint RUN.",
            unchanged=UNCHANGED,
        )
    return Path(str(newest))


def _check_vocabulary(spec: JobSpec, directory: Path, teacher: Teacher, vocab_size: int) -> None:
    """Both must give their logits to the same tokens."""
    remedy = "Name a teacher of the same tokenizer, or leave the student's out: the teacher's is taken then."
    if spec.model.vocab_size not in (None, vocab_size):
        raise UsageError(
            f"{KEY} {directory} has a vocabulary of {vocab_size} tokens, and the student one of "
            f"{spec.model.vocab_size} (model.vocab_size)",
            remedy=remedy,
            unchanged=UNCHANGED,
        )
    named = spec.data.tokenizer
    if named is None or not teacher.tokenizer.exists():
        return
    if load_tokenizer(Path(named)).digest != load_tokenizer(teacher.tokenizer).digest:
        raise UsageError(
            f"the tokenizers of teacher and student differ: {teacher.tokenizer} and {named} (data.tokenizer)",
            remedy=remedy,
            unchanged=UNCHANGED,
        )


def _num_parameters(model: ModelSpec, vocab_size: int) -> int:
    params, _ = listed(model, vocab_size)
    return sum(param.numel for param in params)
