"""The `model.lora` section: low-rank adapters beside the frozen weights of a pretrained model (LoRA, arXiv:2106.09685).

Keys, and the names of modules, are those of peft.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated

from pydantic import AfterValidator, Field

from orchestrator.spec.keys.section import Broken, Section, directory, refuse

TRAINED = ("*.lora.*",)  # patterns of the names of adapters' parameters
# Our matrices by peft's names of modules. gate_proj and up_proj are one matrix here.
MATRICES: Mapping[str, str] = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "output",
    "gate_proj": "gate_up",
    "up_proj": "gate_up",
    "down_proj": "down",
    "q_a_proj": "query_down",
    "q_b_proj": "query_up",
    "kv_a_proj_with_mqa": "latent",
    "kv_b_proj": "key_value",
}
OF_MLPS = ("gate_proj", "up_proj", "down_proj")
_OF_HEADS = ("q_proj", "k_proj", "v_proj", "o_proj")
_OF_LATENTS = ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
_OF_QUERY_LATENTS = ("q_a_proj", "q_b_proj")


def _modules(names: tuple[str, ...]) -> tuple[str, ...]:
    unknown = [name for name in names if name not in MATRICES]
    if unknown:
        raise refuse(f"must be some of {', '.join(MATRICES)}; got {', '.join(unknown)}")
    if ("gate_proj" in names) != ("up_proj" in names):
        raise refuse("must have both gate_proj and up_proj, which are one matrix here, or none of them")
    return names


class LoraSpec(Section):
    """Low-rank adapters. Only these are trained (`train.trainable`), sent, moved, copied and saved; the weights in
    init_from stay as they are, and each worker reads them from there."""

    r: int = Field(default=8, ge=1, description="Rank of the adapters.")
    lora_alpha: float = Field(default=16.0, gt=0, description="Adapters' outputs are multiplied by lora_alpha / r.")
    lora_dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of an adapter's inputs that are left out in training. Not for adapters of experts.",
    )
    target_modules: Annotated[tuple[str, ...], AfterValidator(_modules)] = Field(
        default=("q_proj", "v_proj"),
        min_length=1,
        description="Matrices that get an adapter, by their names in transformers; gate_proj, up_proj and down_proj "
        "are those of dense MLPs, shared experts and routed experts, each of which gets its own.",
    )
    init_from: Annotated[str, AfterValidator(directory)] | None = Field(
        default=None,
        description="Directory of an adapter that peft has saved, which is trained further; r, lora_alpha and "
        "target_modules must agree with it. null: adapters begin with no effect.",
    )
    base_sha256: str = Field(
        default="",
        pattern="^([0-9a-f]{64})?$",
        description="Set at submission: the SHA-256 of the weights in model.init_from, which no checkpoint has.",
    )

    @property
    def scale(self) -> float:
        """Factor on adapters' outputs."""
        return self.lora_alpha / self.r

    @property
    def matrices(self) -> frozenset[str]:
        """Our names of the matrices that get an adapter."""
        return frozenset(MATRICES[name] for name in self.target_modules)

    @property
    def is_of_mlps(self) -> bool:
        """Whether MLPs, and so experts, get adapters."""
        return any(name in OF_MLPS for name in self.target_modules)


def broken_lora(lora: LoraSpec, has_latents: bool, has_query_latents: bool, num_moe_layers: int) -> Iterator[Broken]:
    """The rules between adapters and the model, whose sizes are known, that are broken.

    Args:
        has_latents, has_query_latents: whether keys and values, and queries, are made from latents.
    """
    of_attention: tuple[str, ...] = _OF_HEADS
    if has_latents:
        of_attention = _OF_LATENTS + (_OF_QUERY_LATENTS if has_query_latents else ("q_proj",))
    missing = [name for name in lora.target_modules if name not in (*of_attention, *OF_MLPS)]
    if missing:
        rule = f"target_modules must be modules of this model: {', '.join((*of_attention, *OF_MLPS))}; got "
        yield Broken((("lora", "target_modules"),), rule + ", ".join(missing))
    if lora.lora_dropout and lora.is_of_mlps and num_moe_layers:
        rule = "lora_dropout must be 0 with adapters of experts (gate_proj, up_proj, down_proj), as in peft; got "
        yield Broken((("lora", "lora_dropout"), ("lora", "target_modules")), f"{rule}{lora.lora_dropout:g}")
