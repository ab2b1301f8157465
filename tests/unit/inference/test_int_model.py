"""Models of integers compute what training with their rounding computes."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from orchestrator.errors import UsageError
from orchestrator.inference.int_export import IntFormat, packed
from orchestrator.inference.int_matrix import CHUNK, IntEmbedding, IntMatrix
from orchestrator.inference.int_model import formats_of, use_integers
from orchestrator.model.factory import build_model, single_rank
from orchestrator.model.linear.fake_quant import FakeQuantizer, use_fake_quantization
from orchestrator.model.linear.integers import rounded
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.spec.job import JobSpec
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.pretrained.lora import LoraSpec
from orchestrator.spec.quantization import QuantizationSpec
from tests.support.texts import VOCAB

FORMATS = {
    "int8": {},
    "int8 weights": {"activation_dtype": None},
    "int4": {"weight_dtype": "int4", "group_size": 32},
    "int4 weights": {"weight_dtype": "int4", "group_size": 32, "activation_dtype": None},
    "int4 by row": {"weight_dtype": "int4"},
    "groups that no kernel takes": {"weight_dtype": "int4", "group_size": 16},
    "some": {"params": ["*.experts.*"]},
}
SPEC = ModelSpec(
    vocab_size=VOCAB,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=96,
    moe_intermediate_size=32,
    first_k_dense_replace=1,
    n_routed_experts=4,
    n_shared_experts=1,
)


def _model(spec: ModelSpec = SPEC) -> MoELanguageModel:
    model = build_model(spec, VOCAB, single_rank(spec))
    model.init_weights(1)
    for number, (name, param) in enumerate(model.named_parameters()):
        if ".lora." in name:
            torch.nn.init.normal_(param, std=0.1, generator=torch.Generator().manual_seed(number))
    assert isinstance(model, MoELanguageModel)
    return model.eval()


@pytest.mark.parametrize("rows", [0, 1, 3, CHUNK["cpu"] + 5])
@pytest.mark.parametrize(
    ("bits", "group", "inputs"), [(8, None, 8), (4, None, 8), (4, 32, 8), (4, 32, None), (8, 16, 8)]
)
def test_products_are_those_of_rounded_operands(rows: int, bits: int, group: int | None, inputs: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_NK, x_MK = (torch.randn(size, 64, generator=generator) for size in (48, rows))
    bias_N = torch.randn(48, generator=generator)
    found = IntMatrix(weight_NK, bits, group, inputs)(x_MK, None, bias_N)
    wanted = FakeQuantizer(bits, group, inputs)(x_MK, weight_NK, bias_N)
    close = {"rtol": 1e-5, "atol": 1e-4} if bits == 8 or group is None else {"rtol": 2e-2, "atol": 2e-1}  # bf16 outputs
    torch.testing.assert_close(found, wanted, **close)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("lora", [False, True])
def test_a_model_of_integers_computes_what_rounding_in_training_does(name: str, lora: bool) -> None:
    adapters = LoraSpec(r=2, target_modules=("q_proj", "gate_proj", "up_proj", "down_proj"))
    spec = SPEC.model_copy(update={"lora": adapters}) if lora else SPEC
    trained, model, formats = _model(spec), _model(spec), QuantizationSpec.model_validate(FORMATS[name])
    use_fake_quantization(trained, formats)
    inputs = 8 if formats.activation_dtype else None
    trained.head_product = lambda x: FakeQuantizer(8, None, inputs)(x, trained.head)
    trained.embedding.weight.data = rounded(trained.embedding.weight.data, 8)
    use_integers(model, formats)
    tokens = torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, wanted, plain = model(tokens), trained(tokens), _model(spec)(tokens)
    error, changed = float((found - wanted).norm()), float((plain - wanted).norm())
    # Sums in another order round a few inputs otherwise, and a kernel's outputs in bf16 more of them.
    assert error < (0.5 if formats.num_bits == 4 and formats.group_size == 32 else 0.1) * changed, error / changed


@pytest.mark.parametrize("name", ["int8", "int8 weights", "int4"])
def test_a_loss_is_that_of_the_logits(name: str) -> None:
    model = _model()
    use_integers(model, QuantizationSpec.model_validate(FORMATS[name]))
    tokens = torch.randint(0, VOCAB, (2, 21), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        loss, logits_BTV = model(tokens[:, :-1], tokens[:, 1:]), model(tokens[:, :-1])
    wanted = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-4)


def test_experts_that_stay_as_they_are_are_not_exported() -> None:
    encoding = IntFormat(QuantizationSpec(params=("*.attention.*",)))
    values = torch.zeros(8, 8).numpy()
    assert len(list(encoding.encoded("layers.1.attention.key", "k_proj.weight", values))) == 2
    with pytest.raises(UsageError, match=r"leaves layers.1.mlp.experts.0.down as it is") as caught:
        list(encoding.encoded("layers.1.mlp.experts.0.down", "down_proj.weight", values))
    assert caught.value.remedy and caught.value.unchanged


def test_embeddings_are_int8_by_row() -> None:
    weight_VD = torch.randn(9, 16, generator=torch.Generator().manual_seed(2))
    ids = torch.tensor([[3, 8], [0, 3]])
    assert torch.equal(IntEmbedding(weight_VD)(ids), rounded(weight_VD, 8)[ids])


@pytest.mark.parametrize(("num_bits", "columns"), [(4, 24), (4, 20), (8, 12)])
def test_words_are_those_of_compressed_tensors(num_bits: int, columns: int) -> None:
    half = 2 ** (num_bits - 1)
    values = torch.randint(-half, half, (6, columns), generator=torch.Generator().manual_seed(3)).to(torch.int8)
    assert torch.equal(torch.from_numpy(packed(values.numpy(), num_bits)), pack_to_int32(values, num_bits))


def test_formats_are_those_of_training_and_others_are_refused() -> None:
    job, model = JobSpec(name="quantized"), _model()
    assert formats_of(job, model, "int8").group_size is None and formats_of(job, model, "int4").group_size == 32
    narrow = _model(SPEC.model_copy(update={"moe_intermediate_size": 24}))
    assert formats_of(job, narrow, "int4").group_size is None
    section = QuantizationSpec(weight_dtype="int4", group_size=16)
    trained = job.model_copy(update={"train": job.train.model_copy(update={"quantization": section})})
    assert formats_of(trained, model, "int4") is section
    with pytest.raises(UsageError, match="was trained for int4"):
        formats_of(trained, model, "int8")
