"""The task that a worker trains: its job's, with the teacher that the job names."""

import torch

from orchestrator.model.task import Task
from orchestrator.model.tasks.distillation import Distillation
from orchestrator.spec.job import JobSpec
from orchestrator.worker.whole_models.whole_model import teacher_model


def training_task(spec: JobSpec, task: Task, vocab_size: int, device: torch.device) -> Task:
    """The task, with the job's teacher if there is one, which is loaded here: long before the first step.

    Args:
        task: of the job, without a teacher.
        vocab_size: rows of the model's last matrix.

    Raises:
        UsageError: the teacher is gone, or has changed.
        CheckpointCorrupt, OSError: its files can't be read.
    """
    if spec.distill is None:
        return task
    if spec.distill.teacher is None:
        return Distillation(task, None, spec.distill)
    teacher = teacher_model(spec.distill, vocab_size, spec.train, device)
    return Distillation(task, teacher, spec.distill)
