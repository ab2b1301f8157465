"""Figures of a language model on held-out rows: its loss, the share of texts whose own continuation it prefers, and its
gain from a copy of a text before that text.

Shape legend: I = items, T = tokens, P = tokens of a prompt.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from orchestrator.data.store import IGNORED_TARGET, TokenStore
from orchestrator.model.base import TrainableModel

AT_ONCE = 32  # rows
PROMPT, CONTINUATION = 48, 16  # tokens
CANDIDATES = 4
COPIED = 32  # tokens


@torch.no_grad()
def held_out(model: TrainableModel, store: TokenStore, length: int, num_rows: int) -> Mapping[str, float]:
    """Figures of a model on rows drawn from the validation split, which are the same in each call.

    Args:
        length: tokens of a row.
        num_rows: at most; the split may have fewer.

    Returns:
        `loss`: nats per target. `choice`: share of the prompts whose own continuation is likelier than those of three
        other rows; 0.25 by chance. `copy`: how many nats per token the loss of a text is lower after a copy of it than
        after another text.
    """
    inputs_IT, targets_IT = _drawn(store, length, num_rows)
    losses_IT = _losses(model, inputs_IT, targets_IT)
    rows_IT, next_IT = _drawn(store, PROMPT + CONTINUATION, num_rows)
    items_IT = rows_IT[(next_IT != IGNORED_TARGET).all(1)]  # of one document each
    return {
        "loss": float(losses_IT.sum() / (targets_IT != IGNORED_TARGET).sum()),
        "choice": _choice(model, items_IT),
        "copy": _copy(model, items_IT[:, :COPIED]),
    }


def _choice(model: TrainableModel, items_IT: Tensor) -> float:
    """Others' continuations are of rows far away, since neighbours are of one text."""
    prompts_IP, ends_IT = items_IT[:, :PROMPT], items_IT[:, PROMPT:]
    own_I, *others = (
        _loss_of_last(model, torch.cat((prompts_IP, ends_IT.roll(i * len(items_IT) // CANDIDATES, 0)), 1), CONTINUATION)
        for i in range(CANDIDATES)
    )
    return float((own_I < torch.stack(others).amin(0)).float().mean())


def _copy(model: TrainableModel, items_IT: Tensor) -> float:
    others_IT = items_IT.roll(len(items_IT) // 2, 0)
    after_copy, after_other = (
        _loss_of_last(model, torch.cat((before, items_IT), 1), COPIED).mean() for before in (items_IT, others_IT)
    )
    return float(after_other - after_copy) / COPIED


def _loss_of_last(model: TrainableModel, rows_IT: Tensor, count: int) -> Tensor:
    """The summed loss (I,) of each row's last tokens."""
    return _losses(model, rows_IT[:, :-1], rows_IT[:, 1:])[:, -count:].sum(1)


def _losses(model: TrainableModel, inputs_IT: Tensor, targets_IT: Tensor) -> Tensor:
    """The loss (I, T) of each target in nats."""
    pairs = zip(inputs_IT.split(AT_ONCE), targets_IT.split(AT_ONCE), strict=True)
    return torch.cat([model.token_losses(inputs.contiguous(), targets.contiguous()) for inputs, targets in pairs])


def _drawn(store: TokenStore, length: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (I, T) of held-out rows."""
    numbers = np.random.default_rng(0).permutation(store.num_rows("validation", length))[:num_rows]
    rows = store.rows("validation", np.sort(numbers), length)
    return torch.from_numpy(rows.inputs_RT), torch.from_numpy(rows.targets_RT)
