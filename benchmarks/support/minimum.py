"""The least bytes that must move between two worlds, counted element by element from the definition of ZeRO 1 and 2.

A check on the transfer planner, so it shares no code with it: one boolean per element and worker says who holds what
before and after; whatever a worker holds after and not before has to reach it.

- A worker has the weights of all dense parameters and of the experts that are placed on it.
- The two moments of a group are cut over the group's ranks: the group's parameters in the model's order, end to end,
  padded to a multiple of 16 per rank, in equal parts. What lies on the same ranks, dense parameters apart from experts,
  is divided into groups of at most 25 MiB of fp32, or one parameter, from the model's end.
- A buffer is on every worker.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.state_spec import ParamSpec
from orchestrator.elastic.world import World

FP32_BYTES = 4
NUM_MOMENTS = 2
GROUP_ELEMENTS = 25 * 2**20 // 4

Mask = NDArray[np.bool_]


def minimum_bytes(
    params: Sequence[ParamSpec],
    buffer_elements: int,
    old: World,
    old_placement: ExpertPlacement,
    new: World,
    new_placement: ExpertPlacement,
) -> int:
    """The bytes that workers of `new` lack, in fp32.

    Args:
        params: every parameter of the whole model in its order.
        buffer_elements: of all buffers together.
    """
    before = holdings(params, old, old_placement)
    after = holdings(params, new, new_placement)
    nothing = np.zeros(sum(spec.numel for spec in params), dtype=np.bool_)
    total = 0
    for worker, (weights, moments) in after.items():
        had_weights, had_moments = before.get(worker, (nothing, nothing))
        total += int(np.count_nonzero(weights & ~had_weights))
        total += int(np.count_nonzero(moments & ~had_moments)) * NUM_MOMENTS
        total += 0 if worker in before else buffer_elements
    return total * FP32_BYTES


def holdings(params: Sequence[ParamSpec], world: World, placement: ExpertPlacement) -> dict[str, tuple[Mask, Mask]]:
    """Per worker: which elements' weights it holds, and which elements' moments; all parameters end to end."""
    begins = np.cumsum([0, *(spec.numel for spec in params)])
    groups: dict[tuple[object, tuple[int, ...]], list[int]] = {}
    for number, spec in enumerate(params):
        ranks = tuple(range(world.size)) if spec.expert is None else placement.holders[spec.expert]
        groups.setdefault((spec.expert is None, ranks), []).append(number)
    held = {worker: (np.zeros(begins[-1], np.bool_), np.zeros(begins[-1], np.bool_)) for worker in world.members}
    for (_, ranks), numbers in ((key, cut) for key, group in groups.items() for cut in _divided(params, group)):
        elements = np.concatenate([np.arange(begins[n], begins[n + 1], dtype=np.int32) for n in numbers])
        part = -(-len(elements) // (16 * len(ranks))) * 16
        for place, rank in enumerate(ranks):
            weights, moments = held[world.members[rank]]
            weights[elements] = True
            moments[elements[place * part : (place + 1) * part]] = True
    return held


def _divided(params: Sequence[ParamSpec], numbers: Sequence[int]) -> list[list[int]]:
    divided: list[list[int]] = []
    for number in reversed(numbers):
        if divided and sum(params[n].numel for n in [number, *divided[-1]]) <= GROUP_ELEMENTS:
            divided[-1].insert(0, number)
        else:
            divided.append([number])
    return divided
