"""Changes of experts' clones after a growth: noise on their router rows, and a part of their weights drawn anew.

Both depend on the seed, the step and the parameter alone, so all holders draw the same, and so does a run that goes
back. The first member of each family stays as it is.

Shape legend: E = experts, I = inner width of an expert, P = elements of a parameter.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from orchestrator.elastic.expert_change import ExpertChange
from orchestrator.elastic.state_map import StateMap
from orchestrator.elastic.state_spec import EMA, FACTORS, MASTER, PARAM, ParamSpec, layer_of
from orchestrator.spec.optimizer import is_router
from orchestrator.state.ranges import NamedRanges, Range

WEIGHTS = (PARAM, MASTER, EMA)  # kinds with the values of a parameter
MOMENTS_KEPT = (FACTORS,)  # kinds without a value for each element


@torch.no_grad()
def change_clones(ranges: NamedRanges, mapped: StateMap, seed: int) -> None:
    """Change clones in a state that was moved.

    Args:
        ranges: of the new state, as this rank holds them; written to.
        mapped: the map by which it was made, with a change whose first step is known.
        seed: of the run.
    """
    change = mapped.change
    held: dict[str, list[tuple[str, Range]]] = {}
    for name, part in ranges:
        kind, _, plain = name.partition("/")
        held.setdefault(plain, []).append((kind, part))
    for name, tensor in mapped.new.items():
        param = tensor.like
        if not name.startswith(f"{PARAM}/") or param is None or not ranges.spans(name):
            continue
        sources = mapped.sources_of(name)
        values_P = ranges.view(name, 0, param.numel)
        if change.noise and sources and is_router(param.name) and len(mapped.pieces[name]) > 1:
            added_P = _noise(param, sources, values_P, change, seed)
            for kind, part in held[param.name]:
                if kind in WEIGHTS:
                    part.data.copy_((part.data.float() + added_P[part.start : part.stop]).to(part.data.dtype))
        elif change.reinit_ratio and param.expert is not None and param.expert in _clones(sources):
            is_new_P, new_P = _redrawn(param, values_P, change, seed)
            for kind, part in held[param.name]:
                span = slice(part.start, part.stop)
                if kind in WEIGHTS:
                    part.data.copy_(torch.where(is_new_P[span], new_P[span].to(part.data.dtype), part.data))
                elif kind not in MOMENTS_KEPT:
                    part.data.masked_fill_(is_new_P[span], 0.0)


def _clones(sources: Sequence[int]) -> set[int]:
    """The experts that are not the first ones of their sources."""
    return {expert for expert, source in enumerate(sources) if source in sources[:expert]}


def _noise(param: ParamSpec, sources: Sequence[int], values_P: Tensor, change: ExpertChange, seed: int) -> Tensor:
    """What is added to a router's parameter that has a row per expert, once for each head; 0 but for clones."""
    std = change.noise * values_P.float().std()
    drawn_P = _drawn(param, change, seed).to(values_P.device)
    clones = _clones(sources)
    is_clone_E = torch.tensor([expert in clones for expert in range(len(sources))], device="cpu")
    is_clone_E1 = is_clone_E.repeat(param.rows // len(sources))[:, None].to(values_P.device)
    return (drawn_P.view(param.rows, -1) * std * is_clone_E1).flatten()


def _redrawn(param: ParamSpec, values_P: Tensor, change: ExpertChange, seed: int) -> tuple[Tensor, Tensor]:
    """Which elements of an expert's matrix are drawn anew, those of some inner units, and the matrix with them."""
    rows, columns = param.shape
    is_inner_first = param.blocks > 1  # gate over up; else the second matrix, whose columns are the inner width
    width = rows // param.blocks if is_inner_first else columns
    of_expert = f"{layer_of(param.name)}.{param.expert}"
    shuffled = torch.randperm(width, generator=_generator(seed, change, of_expert), device="cpu")
    units = shuffled[: round(change.reinit_ratio * width)]
    is_new = torch.zeros(width, dtype=torch.bool, device="cpu")
    is_new[units] = True
    is_new = is_new.repeat(param.blocks)[:, None].expand(rows, columns) if is_inner_first else is_new.expand(rows, -1)
    is_new_P = is_new.flatten().to(values_P.device) & (values_P != 0)  # what is pruned stays so
    drawn_P = _drawn(param, change, seed).to(values_P.device)
    replaced = values_P.float()[is_new_P]
    if replaced.numel() < 2:
        return torch.zeros_like(is_new_P), values_P.float()
    return is_new_P, torch.where(is_new_P, replaced.mean() + replaced.std() * drawn_P, values_P.float())


def _drawn(param: ParamSpec, change: ExpertChange, seed: int) -> Tensor:
    """Standard normal values of a parameter, on the host: those of devices differ."""
    return torch.randn(param.numel, generator=_generator(seed, change, param.name), device="cpu")


def _generator(seed: int, change: ExpertChange, name: str) -> torch.Generator:
    key = hashlib.blake2b(f"{seed}/{change.first_step}/{name}".encode(), digest_size=8).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(key, "little") >> 1)
