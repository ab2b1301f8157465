"""Figures of a language model on held-out rows: its loss, whether it tells a text's continuation from others, and
whether it reads what came before.

Shape legend: I = items, T = tokens, P = tokens of a prompt, C = candidates.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from orchestrator.data.store import TokenStore
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
        others; 0.25 by chance. `copy`: the loss of tokens that repeat what came right before, over that of the same
        tokens the first time.
    """
    inputs_IT, targets_IT = _drawn(store, length, num_rows)
    losses_IT = _losses(model, inputs_IT, targets_IT)
    items_IT, _ = _drawn(store, PROMPT + CONTINUATION, num_rows)
    return {
        "loss": float(losses_IT.sum() / (targets_IT >= 0).sum()),
        "choice": _choice(model, items_IT),
        "copy": _copy(model, items_IT[:, :COPIED]),
    }


def _choice(model: TrainableModel, items_IT: Tensor) -> float:
    prompts_IP, own_IT = items_IT[:, :PROMPT], items_IT[:, PROMPT:]
    losses_IC = torch.stack(
        [_loss_of_last(model, torch.cat((prompts_IP, own_IT.roll(shift, 0)), 1)) for shift in range(CANDIDATES)], 1
    )
    return float((losses_IC.argmin(1) == 0).float().mean())


def _loss_of_last(model: TrainableModel, rows_IT: Tensor) -> Tensor:
    """The summed loss (I,) of each row's last `CONTINUATION` tokens."""
    return _losses(model, rows_IT[:, :-1], rows_IT[:, 1:])[:, -CONTINUATION:].sum(1)


def _copy(model: TrainableModel, items_IT: Tensor) -> float:
    twice_IT = torch.cat((items_IT, items_IT), 1)
    losses_IT = _losses(model, twice_IT[:, :-1], twice_IT[:, 1:])
    first, second = losses_IT[:, : COPIED - 1].sum(), losses_IT[:, COPIED:].sum()  # of the same targets
    return float(second / first)


def _losses(model: TrainableModel, inputs_IT: Tensor, targets_IT: Tensor) -> Tensor:
    """The loss (I, T) of each target in nats."""
    pairs = zip(inputs_IT.split(AT_ONCE), targets_IT.split(AT_ONCE), strict=True)
    return torch.cat([model.token_losses(inputs.contiguous(), targets.contiguous()) for inputs, targets in pairs])


def _drawn(store: TokenStore, length: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (I, T) of held-out rows."""
    numbers = np.random.default_rng(0).permutation(store.num_rows("validation", length))[:num_rows]
    rows = store.rows("validation", np.sort(numbers), length)
    return torch.from_numpy(rows.inputs_RT), torch.from_numpy(rows.targets_RT)
