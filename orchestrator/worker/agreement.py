"""Whether all ranks have made the same first weights of a user's own model."""

import torch
import torch.distributed as dist

from orchestrator.comm import ledger
from orchestrator.errors import EntrypointError
from orchestrator.model.base import TrainableModel, expert_of
from orchestrator.model.fitness import shown
from orchestrator.protocol.traffic import TrafficKind
from orchestrator.state.digest import digest


def check_agreement(model: TrainableModel, group: dist.ProcessGroup | None) -> None:
    """Compare what every rank holds. Collective over `group`, the world; None for a world of one.

    Raises:
        EntrypointError: some weights differ, so `build` draws them from something that differs between ranks.
    """
    if group is None:
        return
    state = [*model.named_parameters(), *model.state_buffers()]
    held_by_all = [(name, t) for name, t in state if name.startswith("model.") and expert_of(name) is None]
    signed = [digest(0, t.detach().view(-1)) - (1 << 63) for _, t in held_by_all]
    lowest = torch.tensor(signed, dtype=torch.int64, device=held_by_all[0][1].device)
    highest = lowest.clone()
    dist.all_reduce(lowest, dist.ReduceOp.MIN, group)
    dist.all_reduce(highest, dist.ReduceOp.MAX, group)
    for reduced in (lowest, highest):
        ledger.enter_reduced(TrafficKind.CONTROL, reduced, dist.get_world_size(group))
    names = [name for (name, _), differs in zip(held_by_all, (lowest != highest).tolist(), strict=True) if differs]
    if names:
        raise EntrypointError(
            f"{model.spec.entrypoint} gives {shown(names)} other values on one worker than on another",
            remedy="Draw first weights by torch's global generator, which is seeded for build, or by one that is "
            "seeded with the argument of init_weights(seed).",
        )
