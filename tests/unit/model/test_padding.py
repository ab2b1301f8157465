"""Rows of unequal length: what a padded pass gives is what each row gives by itself."""

from pathlib import Path

import pytest
import torch

from orchestrator.model.attention.padding import Padding
from orchestrator.model.base import TrainableModel
from orchestrator.model.factory import build_model, single_rank
from orchestrator.model.loss import IGNORED
from orchestrator.spec.model import ModelSpec
from tests.support import devices
from tests.support.own_models import linear, own_spec

pytestmark = pytest.mark.usefixtures("device")

VOCAB = 50
LENGTHS = [7, 1, 12, 4]
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
}


def _rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Padding holds tokens and no targets: whoever looks at them changes the result."""
    inputs_BT = torch.randint(0, VOCAB, (4, 12), generator=torch.Generator().manual_seed(5))
    lengths_B = torch.tensor(LENGTHS)
    targets_BT = inputs_BT.roll(-1, 1).where(torch.arange(12) < lengths_B[:, None], IGNORED)
    return inputs_BT.to(devices.device()), targets_BT.to(devices.device()), lengths_B.to(devices.device())


def _gradients(model: TrainableModel) -> dict[str, torch.Tensor]:
    return {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}


def _model(kind: str, directory: Path) -> TrainableModel:
    if kind != "ours":
        layer, through = "self.moe = MoELayer(spec, experts)", "return self.head(self.moe(self.embedding(tokens)))"
        spec = own_spec(directory, linear(layers=layer, forward=through), n_routed_experts=4, num_experts_per_tok=2)
    else:
        spec = ModelSpec.model_validate(SIZES)
    with devices.device():
        model = build_model(spec, VOCAB, single_rank(spec))
    model.init_weights(3)
    return model


@pytest.mark.parametrize("kind", ["ours", "own"])
def test_a_padded_pass_is_the_sum_of_passes_over_its_rows(kind: str, tmp_path: Path) -> None:
    model = _model(kind, tmp_path)
    inputs_BT, targets_BT, lengths_B = _rows()
    loss = model(inputs_BT, targets_BT, None, lengths_B)
    counts_LE = model.routing_counts().counts_LE
    loss.backward()
    padded = _gradients(model)
    model.zero_grad()
    apart, counts = torch.zeros((), device=devices.device()), torch.zeros_like(counts_LE)
    for row, length in enumerate(LENGTHS):
        of_row = model(inputs_BT[row : row + 1, :length], targets_BT[row : row + 1, :length])
        counts += model.routing_counts().counts_LE
        of_row.backward()
        apart = apart + of_row.detach()
    torch.testing.assert_close(loss.detach(), apart)
    assert torch.equal(counts_LE, counts)  # padding is routed nowhere
    assert int(counts_LE[0].sum()) == 2 * sum(LENGTHS)
    for name, grad in _gradients(model).items():
        torch.testing.assert_close(padded[name], grad, msg=name)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_changes_nothing(recompute: str) -> None:
    found = []
    for how in ("none", recompute):
        spec = ModelSpec.model_validate({**SIZES, "gradient_checkpointing": how})
        with devices.device():
            model = build_model(spec, VOCAB, single_rank(spec))
        model.init_weights(3)
        inputs_BT, targets_BT, lengths_B = _rows()
        model(inputs_BT, targets_BT, None, lengths_B).backward()
        found.append(_gradients(model))
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, msg=name)


@pytest.mark.parametrize("kind", ["ours", "own"])
def test_a_pass_on_no_rows_gives_every_parameter_a_gradient_of_zeros(kind: str, tmp_path: Path) -> None:
    model = _model(kind, tmp_path)
    nothing = torch.zeros(0, 1, dtype=torch.int64, device=devices.device())
    model(nothing, nothing, None, nothing[:, 0]).backward()
    grads = _gradients(model)
    assert grads.keys() == dict(model.named_parameters()).keys()
    assert not any(grad.any() for grad in grads.values())


def test_logits_are_padded_with_zeros() -> None:
    model = _model("ours", Path())
    inputs_BT, _, lengths_B = _rows()
    logits_BTV = model(inputs_BT, lengths_B=lengths_B)
    assert logits_BTV.shape == (4, 12, VOCAB)
    torch.testing.assert_close(logits_BTV[2:3], model(inputs_BT[2:3]))
    assert not logits_BTV[0, 7:].any()


def test_tokens_are_read_back_at_their_positions() -> None:
    padding = Padding.of(torch.tensor([2, 0, 3], device=devices.device()), 3)
    x_ND = torch.arange(5.0, device=devices.device())[:, None]
    padded = padding.pad(x_ND)
    assert padded[..., 0].tolist() == [[0, 1, 0], [0, 0, 0], [2, 3, 4]]
    assert torch.equal(padding.unpad(padded), x_ND)
