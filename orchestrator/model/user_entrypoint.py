"""The module that a user's entrypoint builds, or transformers."""

from pathlib import Path

import torch
from torch import nn

from orchestrator.errors import EntrypointError
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.transformers_impl.transformers_model import build_transformers
from orchestrator.spec.model import ModelSpec
from orchestrator.user_code import calling_user, function_of


def built(spec: ModelSpec, vocab_size: int, home: ExpertParallelContext, seed: int) -> nn.Module:
    """The module that the entrypoint builds, or transformers from `spec.config`. torch's random numbers are seeded
    meanwhile.

    Raises:
        EntrypointError: it can't be imported, raises, or returns no module.
    """
    if spec.entrypoint is None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return build_transformers(spec, vocab_size, home)
    build = function_of("model.entrypoint", spec.entrypoint, Path(spec.code_dir))
    with torch.random.fork_rng(), calling_user(f"{spec.entrypoint}"):
        torch.manual_seed(seed)
        module = build(spec, vocab_size, home)
    if not isinstance(module, nn.Module):
        raise EntrypointError(
            f"model.entrypoint {spec.entrypoint} returned a {type(module).__name__}",
            remedy="It must return a torch.nn.Module that maps tokens to logits.",
        )
    return module
