"""One slot of the global batch, as tensors."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class MicroBatch:
    """A slot: B rows of T tokens. B may be 0: a rank without a slot still runs the forward pass.

    Args:
        inputs_BT: token ids, int64.
        targets_BT: the next token of each, or `IGNORED`, int64.
        documents_BT: document number per token where attention must stay within documents, else None.
        lengths_B: given, row b's tokens from lengths_B[b] on are padding.
    """

    inputs_BT: Tensor
    targets_BT: Tensor
    documents_BT: Tensor | None = None
    lengths_B: Tensor | None = None
