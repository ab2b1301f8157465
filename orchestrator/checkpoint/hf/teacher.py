"""The teacher of a run that learns by distillation: a directory that transformers has saved, or a checkpoint of another
run. Torch-free, so that a submission can check it; `orchestrator.worker.whole_models.whole_model` loads it.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from orchestrator.checkpoint.hf.pretrained import check_weights, open_pretrained, resolved, weights_digest
from orchestrator.checkpoint.manifest import MANIFEST_FILE
from orchestrator.checkpoint.read import read_manifest
from orchestrator.errors import UsageError
from orchestrator.spec.distill import DistillSpec
from orchestrator.spec.job import JobSpec
from orchestrator.spec.model import ModelSpec

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


def open_teacher(directory: Path) -> Teacher:
    """Describe a teacher.

    Raises:
        UsageError: no such directory, or a model that can't be a teacher.
        CheckpointCorrupt: its files are not complete, or damaged.
    """
    if not (directory / MANIFEST_FILE).exists():
        model = resolved(ModelSpec(), directory, KEY)
        open_pretrained(directory).check(model)
        return Teacher(model, None, directory / TOKENIZER)
    run_dir = directory.parent.parent
    try:
        job = JobSpec.model_validate_json((run_dir / "job.json").read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{KEY} {directory} is a checkpoint, and the job of its run, {run_dir}/job.json, can't be read: {error}",
            remedy="Leave checkpoints in the directory of their run, or name what `model export` makes of one.",
            unchanged=UNCHANGED,
        ) from error
    if not job.model.is_native or not job.has_tokens:
        what = "a model of your own or of transformers" if job.has_tokens else "no text"
        raise UsageError(
            f"{KEY} {directory} is a checkpoint of run {job.name}, which has {what}",
            remedy="Name a checkpoint of one of this package's models that predicts tokens, or a directory that "
            "`model export` has written.",
            unchanged=UNCHANGED,
        )
    experts = read_manifest(directory).experts
    job = job if experts is None else job.with_experts(experts.num_experts)
    return Teacher(job.model, job, run_dir / TOKENIZER)


def teacher_digest(directory: Path) -> str:
    """SHA-256 of a teacher's weights; of a checkpoint, and of predictions, that of the manifest, which has the digests
    of their files."""
    manifest = directory / MANIFEST_FILE
    return hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.exists() else weights_digest(directory)


def check_teacher(distill: DistillSpec | None) -> None:
    """Check that a run's teacher, or what it predicts, is what the run began with. Raises UsageError if it is gone or
    has changed."""
    if distill is None:
        return
    what = "teacher" if distill.logits is None else "teacher's predictions"
    remedy = f"Bring back the {what} that the run began with, under {distill.directory}."
    of_what = f"of the {what} that the run learns from"
    check_weights(Path(distill.directory), distill.teacher_sha256, of_what, remedy, teacher_digest)
