"""The task that a worker trains: its job's, with the teacher that the job names and the losses of its model's exits."""

import torch

from orchestrator.model.task import Task
from orchestrator.model.tasks.distillation import Distillation
from orchestrator.model.tasks.exit_losses import ExitLosses
from orchestrator.spec.job import JobSpec
from orchestrator.worker.whole_models.whole_model import teacher_model


def training_task(spec: JobSpec, task: Task, vocab_size: int, device: torch.device) -> Task:
    """The task, with exits' losses if there are some, and the job's teacher if there is one, which is loaded here: long
    before the first step.

    Args:
        task: of the job, without a teacher and exits.
        vocab_size: rows of the model's last matrix.

    Raises:
        UsageError: the teacher is gone, or has changed.
        CheckpointCorrupt, OSError: its files can't be read.
    """
    exits = spec.model.exits
    if spec.distill is not None:
        has_model = spec.distill.teacher is not None
        teacher = teacher_model(spec.distill, vocab_size, spec.train, device) if has_model else None
        return Distillation(task, teacher, spec.distill, exits)
    return task if exits is None else ExitLosses(task, exits)
