"""The task that a worker trains: its job's, with the teacher that the job names."""

import torch

from orchestrator.model.task import Task
from orchestrator.model.tasks.all_tasks import task_of
from orchestrator.model.tasks.distillation import Distillation
from orchestrator.spec.job import JobSpec
from orchestrator.worker.whole_models.whole_model import teacher_model


def training_task(spec: JobSpec, vocab_size: int, device: torch.device) -> Task:
    """The task. A teacher is loaded here, long before the first step.

    Args:
        vocab_size: tokens of the prepared data's vocabulary.

    Raises:
        EntrypointError: a task of the user's can't be made.
        UsageError: the teacher is gone, or has changed.
        CheckpointCorrupt: its files can't be read.
    """
    task = task_of(spec.task, spec.data_format)
    if spec.distill is None:
        return task
    if spec.distill.teacher is None:
        return Distillation(task, None, spec.distill)
    teacher = teacher_model(spec.distill, spec.num_outputs(vocab_size), spec.train, device)
    return Distillation(task, teacher, spec.distill)
