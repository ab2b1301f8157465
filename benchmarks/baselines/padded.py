"""Our model as trainers have it that don't know of padding: it goes through all layers and to the experts, like any
token. Its targets are ignored, so what is learned is the same but for routers' balance.

Shape legend: B = rows, T = tokens in a row, V = vocabulary.
"""

from torch import Tensor, nn

from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.spec.model import ModelSpec


class Padded(nn.Module):
    def __init__(self, spec: ModelSpec, vocab_size: int, experts: ExpertParallelContext) -> None:
        super().__init__()
        self.inner = MoELanguageModel(spec, vocab_size, experts)

    def forward(self, inputs_BT: Tensor) -> Tensor:
        for layer in self.inner.moe_layers:
            layer.real_N = None
        logits_BTV: Tensor = self.inner(inputs_BT)
        return logits_BTV

    def init_weights(self, seed: int) -> None:
        self.inner.init_weights(seed)


def build(spec: ModelSpec, vocab_size: int, experts: ExpertParallelContext) -> nn.Module:
    return Padded(spec, vocab_size, experts)
