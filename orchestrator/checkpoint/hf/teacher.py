"""The teacher of a run that learns by distillation: a directory that transformers has saved, or a checkpoint of another
run. Torch-free, so that a submission can check it; `orchestrator.worker.whole_models.whole_model` loads it.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from orchestrator.checkpoint.hf.pretrained import check_base, check_weights, open_pretrained, resolved, weights_digest
from orchestrator.checkpoint.manifest import MANIFEST_FILE, parse_checkpoint_name
from orchestrator.checkpoint.read import read_manifest
from orchestrator.errors import UsageError
from orchestrator.spec.distill import DistillSpec
from orchestrator.spec.job import JobSpec
from orchestrator.spec.model import ModelSpec

OTHER_TEACHER = (
    "Name a directory that `orchestrator model export` has written, or `save_pretrained` of a family in "
    "docs/pretrained.md; a checkpoint of a run that trains one of this package's models on text; or such a run."
)
KEY, TOKENIZER = "distill.teacher", "tokenizer.json"
UNCHANGED = "Nothing was started."


@dataclass(frozen=True)
class Teacher:
    """A teacher, described by what lies beside its weights.

    Args:
        model: with all sizes; of a directory of transformers `init_from` names it.
        job: of the run that wrote the checkpoint; None: it is no checkpoint.
        tokenizer: file of the tokenizer whose tokens it takes.
    """

    model: ModelSpec
    job: JobSpec | None
    tokenizer: Path


def open_teacher(directory: Path, key: str = KEY) -> Teacher:
    """Describe a teacher.

    Args:
        key: that names it, for errors.

    Raises:
        UsageError: no such directory, or a model that can't be a teacher.
        CheckpointCorrupt: its files are not complete, or damaged.
    """
    if not (directory / MANIFEST_FILE).exists():
        model = resolved(ModelSpec(), directory, key, OTHER_TEACHER)
        open_pretrained(directory).check(model)
        return Teacher(model, None, directory / TOKENIZER)
    if parse_checkpoint_name(directory.name) is None:
        raise UsageError(
            f"{key} {directory} is no model: its {MANIFEST_FILE} is not that of a checkpoint",
            remedy=f"{OTHER_TEACHER} What `data teach` has written is named by distill.logits.",
            unchanged=UNCHANGED,
        )
    run_dir = directory.parent.parent
    try:
        job = JobSpec.model_validate_json((run_dir / "job.json").read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{key} {directory} is a checkpoint, and the job of its run, {run_dir}/job.json, can't be read: {error}",
            remedy="Leave checkpoints in the directory of their run, or name what `model export` makes of one.",
            unchanged=UNCHANGED,
        ) from error
    if not job.model.is_native or not job.has_tokens:
        what = "a model of your own or of transformers" if job.has_tokens else "no text"
        raise UsageError(
            f"{key} {directory} is a checkpoint of run {job.name}, which has {what}",
            remedy=OTHER_TEACHER,
            unchanged=UNCHANGED,
        )
    check_base(job.model)
    experts = read_manifest(directory).experts
    job = job if experts is None else job.with_experts(experts.num_experts)
    return Teacher(job.model, job, run_dir / TOKENIZER)


def teacher_digest(directory: Path) -> str:
    """SHA-256 of a teacher's weights; of a checkpoint that of its manifest, which has the digests of its files."""
    if (directory / MANIFEST_FILE).exists():
        return predictions_digest(directory)
    return weights_digest(directory)


def predictions_digest(directory: Path) -> str:
    """SHA-256 of the manifest of a directory, which has the digests of its files. Raises UsageError without one."""
    try:
        return hashlib.sha256((directory / MANIFEST_FILE).read_bytes()).hexdigest()
    except FileNotFoundError as error:
        raise UsageError(
            f"{directory} has no {MANIFEST_FILE}",
            remedy="Compute it again: orchestrator data teach.",
            unchanged=UNCHANGED,
        ) from error


def check_teacher(distill: DistillSpec | None) -> None:
    """Check that a run's teacher, or what it predicts, is what the run began with. Raises UsageError if it is gone or
    has changed."""
    if distill is None:
        return
    is_whole = distill.logits is None
    remedy = f"Bring back what the run began with, under {distill.directory}."
    what = "the weights of the teacher that the run learns from" if is_whole else "the predictions that it learns from"
    digest_of = teacher_digest if is_whole else predictions_digest
    check_weights(Path(distill.directory), distill.teacher_sha256, what, remedy, digest_of)
