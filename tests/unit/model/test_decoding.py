"""Sampling, and the key-value cache: what it returns is what the whole row would give."""

from itertools import pairwise

import pytest
import torch

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.inference.sampling import next_token
from orchestrator.model.attention.kv_cache import KVCache
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.spec.model import ModelSpec
from tests.support import devices

VOCAB = 61
SPECS = {
    "plain": {},
    "all of it": {"qk_norm": True, "attention_bias": True, "partial_rotary_factor": 0.5, "scoring_func": "softmax"},
    "no grouped heads": {"num_key_value_heads": 4},
    "latent": {"kv_lora_rank": 12, "q_lora_rank": 10, "rope_interleave": True, "v_head_dim": 10},
    "latent keys": {"kv_lora_rank": 12},
    "longer than trained": {
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8}
    },
}


def _model(**changes: object) -> MoELanguageModel:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
    }
    spec = ModelSpec(
        **(sizes | {"n_routed_experts": 4, "moe_intermediate_size": 16, "initializer_range": 0.2} | changes)
    )  # type: ignore[arg-type]
    with devices.device():
        model = MoELanguageModel(spec, VOCAB, ExpertParallelContext(ExpertPlacement.balanced(4, 1), 0, None))
    model.init_weights(0)
    return model


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("changes", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("borders", [(0, 1, 2, 3, 4, 12), (0, 7, 8, 9, 12), (0, 5, 9, 12), (0, 12)])
def test_logits_with_a_cache_equal_those_without(changes: dict[str, object], borders: tuple[int, ...]) -> None:
    model = _model(**changes)
    inputs_BT = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1)).to(devices.device())
    cache = KVCache(model.spec, 2, 12, model.head)
    with torch.no_grad():
        wanted_BTV = model(inputs_BT)
    for start, stop in pairwise(borders):
        found_BV = model.extend(inputs_BT[:, start:stop], cache)
        torch.testing.assert_close(found_BV, wanted_BTV[:, stop - 1], rtol=1e-5, atol=1e-5)
    assert cache.length == 12
    with pytest.raises(ValueError, match="13 tokens in a cache for 12"):
        model.extend(inputs_BT[:, :1], cache)


LOGITS = torch.log(torch.tensor([0.1, 0.5, 0.05, 0.35]))


def _chosen(temperature: float, top_k: int | None = None, top_p: float = 1.0) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    counts = [0.0] * 4
    for _ in range(2000):
        counts[next_token(LOGITS, temperature, top_k, top_p, generator)] += 1 / 2000
    return counts


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ((0.0,), [0.0, 1.0, 0.0, 0.0]),
        ((1.0,), [0.1, 0.5, 0.05, 0.35]),
        ((1.0, 2), [0.0, 0.5 / 0.85, 0.0, 0.35 / 0.85]),
        ((1.0, None, 0.5), [0.0, 1.0, 0.0, 0.0]),
        ((1.0, None, 0.51), [0.0, 0.5 / 0.85, 0.0, 0.35 / 0.85]),
        ((1.0, 9, 0.9), [0.1 / 0.95, 0.5 / 0.95, 0.0, 0.35 / 0.95]),
        ((0.5,), [0.01 / 0.385, 0.25 / 0.385, 0.0025 / 0.385, 0.1225 / 0.385]),
    ],
    ids=["greedy", "as they are", "top 2", "half", "a little more than half", "more than there are", "colder"],
)
def test_tokens_are_chosen_with_their_shares(settings: tuple[float], shares: list[float]) -> None:
    assert _chosen(*settings) == pytest.approx(shares, abs=0.03)
    assert [share > 0 for share in _chosen(*settings)] == [share > 0 for share in shares]


def test_the_seed_decides() -> None:
    drawn = [
        [next_token(LOGITS, 1.0, None, 1.0, generator) for _ in range(20)]
        for generator in (torch.Generator().manual_seed(seed) for seed in (3, 3, 4))
    ]
    assert drawn[0] == drawn[1] != drawn[2]
