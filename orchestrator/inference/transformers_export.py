"""Export of a model that transformers builds (`model.impl`), by transformers itself: names and files are its own."""

from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from orchestrator.model.base import TrainableModel
from orchestrator.model.transformers_impl.transformers_experts import BIASES
from orchestrator.model.transformers_impl.transformers_model import meta_model, their_name

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def write_transformers(model: TrainableModel, num_outputs: int, sequence_length: int, dtype: str, to: Path) -> int:
    """Write config and weights into the directory. The whole model is in memory twice, in fp32 and in `dtype`.

    Args:
        model: of a world of one.
        dtype: fp32 or bf16; biases of routers, and what transformers keeps so, stay fp32.

    Returns:
        bytes of weights.
    """
    theirs = meta_model(model.spec, num_outputs)
    in_fp32 = (*BIASES, *(theirs._keep_in_fp32_modules_strict or ()))
    whole: dict[str, Tensor] = {}
    stacked: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for name, tensor in (*model.named_parameters(), *model.state_buffers()):
        their, expert = their_name(name)
        kept = tensor.detach() if their.endswith(in_fp32) else tensor.detach().to(DTYPES[dtype])
        if expert is None:
            whole[their] = kept
        else:
            stacked[their][expert] = kept
    whole |= {name: torch.stack([experts[e] for e in sorted(experts)]) for name, experts in stacked.items()}
    theirs.load_state_dict(whole, strict=False, assign=True)
    theirs.tie_weights()
    theirs.config.dtype = DTYPES[dtype]
    theirs.config.use_cache = True
    theirs.config.max_position_embeddings = max(sequence_length, theirs.config.max_position_embeddings or 0)
    theirs.save_pretrained(to)
    return sum(path.stat().st_size for path in to.glob("*.safetensors"))
