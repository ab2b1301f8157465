"""Checks that documents of a row stay apart where `data.isolate_documents` is true: in a model, and in a user's task.

Shape legend: B = rows, T = tokens in a row.
"""

import torch
from torch import Tensor

from orchestrator.errors import EntrypointError
from orchestrator.model.base import TrainableModel
from orchestrator.model.draws import seed_draws
from orchestrator.model.loss import IGNORED
from orchestrator.model.task import Task
from orchestrator.spec.job import JobSpec
from orchestrator.user_code import calling_user

SAME_OUTPUT, SAME_LOSS = 1e-3, 1e-5  # relative differences; in a sum of losses those of tokens cancel out


@torch.no_grad()
def check_isolation(job: JobSpec, model: TrainableModel, task: Task, vocab_size: int, device: torch.device) -> None:
    """Check that a row's second document doesn't see its first one.

    Raises:
        EntrypointError: the model's outputs for it, or the loss of a user's task, depend on the first one.
    """
    half, last = job.train.sequence_length // 2, vocab_size - 1
    rows = torch.zeros((2, job.train.sequence_length), dtype=torch.int64, device=device)
    rows[1, :half] = last  # documents that differ in the first one
    documents_BT = torch.zeros_like(rows)
    documents_BT[:, half:] = 1
    was_training = model.training
    model.eval()
    _check_model(model, rows, documents_BT)
    if job.task.entrypoint is not None:
        _check_task(task, f"task.entrypoint {job.task.entrypoint}", model, rows, documents_BT)
    model.train(was_training)


def _check_model(model: TrainableModel, rows_BT: Tensor, documents_BT: Tensor) -> None:
    with calling_user(f"a pass of {model.spec.origin} on two documents"):
        outputs_BTV = model(rows_BT, documents_BT=documents_BT)
    one, other = outputs_BTV[:, documents_BT[0] == 1]
    difference = (one - other).abs().max()
    if difference > SAME_OUTPUT * one.abs().max():
        raise EntrypointError(
            f"data.isolate_documents is true, and in {model.spec.origin} a document sees the one before it in its row: "
            f"its outputs differ by {float(difference):.2g} with another one there",
            remedy="Let attention, and whatever else mixes tokens, stay within documents_BT, or turn isolation off.",
        )


def _check_task(task: Task, name: str, model: TrainableModel, rows_BT: Tensor, documents_BT: Tensor) -> None:
    targets_BT = rows_BT.masked_fill(documents_BT == 0, IGNORED)
    losses: list[float] = []
    for row in (slice(0, 1), slice(1, 2)):
        batch = {"inputs": rows_BT[row], "targets": targets_BT[row], "documents": documents_BT[row]}
        with torch.random.fork_rng(), calling_user(f"the loss of {name} on two documents"):
            seed_draws(0, 0, 0)
            losses.append(float(task.loss(model, batch).total))
    if abs(losses[0] - losses[1]) > SAME_LOSS * abs(losses[0]):
        raise EntrypointError(
            f"data.isolate_documents is true, and the loss of {name} depends on a document without targets: of the one "
            f"behind it in its row it is {losses[0]:.7g}, with another document there {losses[1]:.7g}",
            remedy='Pass batch["documents"] to the model, as in model.token_losses(inputs, targets, '
            "documents_BT=documents), take no loss where targets are IGNORED, or turn isolation off.",
        )
