"""Units of a module that can be left out as a whole: neurons of an MLP, heads of an attention.

Shape legend: P = elements of a parameter before the units, U = units, Q = elements after them.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class UnitSlices:
    """The elements of one parameter that belong to each unit.

    Args:
        name: of the parameter in its module.
        dim: dimension along which the units lie, equally long each.
        blocks: how often all units follow each other along it.
    """

    name: str
    dim: int = 0
    blocks: int = 1

    def by_unit(self, param: Tensor, num_units: int) -> Tensor:
        """The elements [P, U, Q], a view of a contiguous parameter."""
        before = self.blocks
        for size in param.shape[: self.dim]:
            before *= size
        return param.view(before, num_units, -1)

    def without(self, param: Tensor, num_units: int, kept: Tensor) -> Tensor:
        """The parameter with some of the units only.

        Args:
            kept: their numbers, ascending, int64.
        """
        shape = list(param.shape)
        shape[self.dim] = shape[self.dim] // num_units * len(kept)
        return self.by_unit(param, num_units).index_select(1, kept).reshape(shape)


@dataclass(frozen=True)
class Structure:
    """Equal units of a module.

    Args:
        pattern: of `spec.pruning` that prunes them.
        parts: matrices with elements of each; those alone tell whether a unit has an effect.
        multiple: as many are left out as are a multiple of it: the shared experts of a layer are one MLP.
        biases: vectors with elements of each.
    """

    pattern: str
    num_units: int
    parts: tuple[UnitSlices, ...]
    multiple: int = 1
    biases: tuple[UnitSlices, ...] = ()
