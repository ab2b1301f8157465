"""Limits on the experts among which a token may choose.

Shape legend: N = tokens, E = experts, G = groups or families of experts, e = experts of the largest one.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Limit(nn.Module):
    """Limits each token to the experts of its best groups.

    Args:
        groups: by expert, its group, by any name.
        top: number of groups that a token may visit.
        best: a group's score is the sum of its `best` highest expert scores.
    """

    member_Ge: Tensor
    group_E: Tensor

    def __init__(self, groups: Sequence[int | str], top: int, best: int) -> None:
        super().__init__()
        members = [[e for e, mine in enumerate(groups) if mine == group] for group in dict.fromkeys(groups)]
        size, padding = max(map(len, members)), len(groups)
        self.top, self._best = min(top, len(members)), min(best, size)
        member_Ge = torch.tensor([mine + [padding] * (size - len(mine)) for mine in members])
        group_E = torch.tensor([next(g for g, mine in enumerate(members) if e in mine) for e in range(len(groups))])
        self.register_buffer("member_Ge", member_Ge, persistent=False)
        self.register_buffer("group_E", group_E, persistent=False)

    def forward(self, choice_NE: Tensor) -> tuple[Tensor, Tensor]:
        """The scores with those outside of a token's best groups at -inf; and by expert the margin of its group: the
        excess over the best excluded group, or (at most 0) the deficit to the last admitted one."""
        padded_NE = F.pad(choice_NE, (0, 1), value=float("-inf"))
        choice_NGe = padded_NE[:, self.member_Ge]
        first_NG, *others = choice_NGe.topk(self._best, dim=-1).values.unbind(-1)
        goodness_NG = sum((other.masked_fill(other == float("-inf"), 0.0) for other in others), first_NG)
        best = goodness_NG.topk(self.top, dim=-1)
        is_best_NG = torch.zeros_like(goodness_NG).scatter_(1, best.indices, 1.0)
        limited_NE = choice_NE.masked_fill(is_best_NG[:, self.group_E] == 0, float("-inf"))
        last_in_N1 = best.values[:, -1:]
        first_out_N1 = goodness_NG.masked_fill(is_best_NG > 0, float("-inf")).amax(-1, keepdim=True)
        margin_NG = goodness_NG - torch.where(is_best_NG > 0, first_out_N1, last_in_N1)
        margin_NG = margin_NG.masked_fill(goodness_NG == float("-inf"), float("inf"))  # excluded by another limit
        return limited_NE, margin_NG[:, self.group_E]


class OneOfFamily(nn.Module):
    """Limits each token to the best expert of each family; of equal ones to the first.

    Args:
        families: by expert, its family.
    """

    member_Ge: Tensor
    place_E: Tensor

    def __init__(self, families: Sequence[int]) -> None:
        super().__init__()
        members = [[e for e, mine in enumerate(families) if mine == family] for family in dict.fromkeys(families)]
        size, padding = max(map(len, members)), len(families)
        padded = [mine + [padding] * (size - len(mine)) for mine in members]
        place = {expert: number for number, expert in enumerate(e for mine in padded for e in mine) if expert < padding}
        self.register_buffer("member_Ge", torch.tensor(padded), persistent=False)
        self.register_buffer("place_E", torch.tensor([place[e] for e in range(padding)]), persistent=False)

    def forward(self, choice_NE: Tensor) -> tuple[Tensor, Tensor]:
        """The scores with all but those of each family's best at -inf; and by expert its excess over the best of the
        others in its family: at most 0 but for the best, inf for one without others."""
        padded_NE = F.pad(choice_NE, (0, 1), value=float("-inf"))
        choice_NGe = padded_NE[:, self.member_Ge]
        best_NG1 = choice_NGe.amax(-1, keepdim=True)
        equal_NGe = choice_NGe == best_NG1
        is_best_NGe = equal_NGe & (equal_NGe.cumsum(-1) == 1)
        second_NG1 = choice_NGe.masked_fill(is_best_NGe, float("-inf")).amax(-1, keepdim=True)
        margin_NGe = choice_NGe - torch.where(is_best_NGe, second_NG1, best_NG1)
        is_best_NE = is_best_NGe.flatten(1)[:, self.place_E]
        margin_NE = margin_NGe.flatten(1)[:, self.place_E]
        limited_NE = choice_NE.masked_fill(~is_best_NE, float("-inf"))
        return limited_NE, margin_NE.masked_fill(margin_NE.isnan(), float("inf"))
