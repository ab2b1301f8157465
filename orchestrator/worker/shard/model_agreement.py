"""Check that all ranks built the same user model: first weights, and the order of its gradients."""

from collections.abc import Sequence
from hashlib import sha256

import torch
import torch.distributed as dist

from orchestrator.comm import traffic_meter
from orchestrator.elastic.state_spec import expert_of
from orchestrator.errors import EntrypointError
from orchestrator.model.base import TrainableModel
from orchestrator.model.user_rules import shown
from orchestrator.protocol.usage import TrafficKind
from orchestrator.state.digest import digests

MOST_BUCKETS = 64  # whose order is compared


def check_agreement(model: TrainableModel, group: dist.ProcessGroup | None) -> None:
    """Compare the state that every rank holds. Collective over `group`, the world; None for a world of one.

    Raises:
        EntrypointError: some weights differ, so `build` draws them from something that differs between ranks.
    """
    if group is None:
        return
    state = [*model.named_parameters(), *model.state_buffers()]
    held_by_all = [(name, t) for name, t in state if name.startswith("model.") and expert_of(name) is None]
    signed = [value - (1 << 63) for value in digests((0, t.detach().view(-1)) for _, t in held_by_all)]
    lowest = torch.tensor(signed, dtype=torch.int64, device=held_by_all[0][1].device)
    highest = lowest.clone()
    dist.all_reduce(lowest, dist.ReduceOp.MIN, group)
    dist.all_reduce(highest, dist.ReduceOp.MAX, group)
    for reduced in (lowest, highest):
        traffic_meter.enter_reduced(TrafficKind.CONTROL, reduced, dist.get_world_size(group))
    names = [name for (name, _), differs in zip(held_by_all, (lowest != highest).tolist(), strict=True) if differs]
    if names:
        raise EntrypointError(
            f"{model.spec.origin} gives {shown(names)} other values on one worker than on another",
            remedy="Draw first weights by torch's global generator, which is seeded for build, or by one that is "
            "seeded with the argument of init_weights(seed).",
        )


def check_order(names: Sequence[str], origin: str, group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Compare the order in which every rank will send its dense gradients: a rank with another order would block the
    others for ever. Collective over `group`, the world; None for a world of one.

    Args:
        names: of gradient buckets, each made of its parameters' names.

    Raises:
        EntrypointError: names the rank that differs from rank 0, and where.
    """
    if group is None:
        return
    numbers = [_number(name) for name in names[:MOST_BUCKETS]]
    mine = torch.tensor(numbers + [0] * (MOST_BUCKETS - len(numbers)), device=device)
    everybodys = mine.new_empty(group.size(), len(mine))
    dist.all_gather_single(everybodys, mine[None], group=group)
    traffic_meter.enter_gathered(TrafficKind.CONTROL, everybodys, group.size())
    for rank, theirs in enumerate(everybodys.cpu()):
        (differing,) = torch.nonzero(theirs != everybodys[0].cpu(), as_tuple=True)
        if len(differing):
            place = int(differing[0])
            held = names[place] if place < len(names) else "nothing"
            raise EntrypointError(
                f"{origin} has other parameters, or another order of them, on rank {rank} than on rank 0, from "
                f"bucket {place} of gradients on; here it is {held}",
                remedy="Let build make the same modules in the same order on every worker; only experts may differ.",
            )


def _number(name: str) -> int:
    return int.from_bytes(sha256(name.encode()).digest()[:7], "little") + 1  # 0 is for none
