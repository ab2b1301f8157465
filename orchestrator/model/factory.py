"""Construction of a job's model, ours or a user's own, and the listing of its parameters."""

from dataclasses import replace

from orchestrator.elastic.expert_change import ExpertSet
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.state_spec import ParamSpec
from orchestrator.model.base import TrainableModel, meta_device, spec_of
from orchestrator.model.linear.products import LinearProducts
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.model.user_model import UserModel
from orchestrator.spec.model import ModelSpec


def build_model(spec: ModelSpec, vocab_size: int, home: ExpertParallelContext) -> TrainableModel:
    """The model as one rank holds it, with unset weights.

    Args:
        vocab_size: V, from the tokenizer.
        home: placement of the experts, seen from this rank.

    Raises:
        EntrypointError: the user's module can't be imported, fails, or builds a model that can't be trained.
    """
    kind = MoELanguageModel if spec.is_native else UserModel
    model = kind(spec, vocab_size, home)
    if spec.lora is not None:
        for module in list(model.modules()):
            if isinstance(module, LinearProducts):
                module.add_adapters(spec.lora)
    return model


def single_rank(spec: ModelSpec, experts: ExpertSet | None = None) -> ExpertParallelContext:
    """All experts on one rank, without a process group: for a model in a world of one.

    Args:
        experts: as many as `spec` has, with their families; None: there are none.
    """
    families = experts.families_by_name(spec.moe_layers) if experts is not None else {}
    return ExpertParallelContext(ExpertPlacement.balanced(spec.n_routed_experts, 1), 0, None, families=families)


def catalogue(
    spec: ModelSpec, vocab_size: int, keeps_saliency: bool = False
) -> tuple[list[ParamSpec], list[tuple[str, tuple[int, ...]]]]:
    """Every parameter of the whole model in order, and its persistent buffers, without allocating memory.

    Args:
        keeps_saliency: as in `ExpertParallelContext`.

    Returns:
        parameters (all experts included), and buffers as (name, shape).

    Raises:
        EntrypointError: as `build_model`.
    """
    with meta_device():
        model = build_model(spec, vocab_size, replace(single_rank(spec), keeps_saliency=keeps_saliency))
    params = [spec_of(name, p) for name, p in model.named_parameters()]
    return params, [(name, tuple(buffer.shape)) for name, buffer in model.state_buffers()]
