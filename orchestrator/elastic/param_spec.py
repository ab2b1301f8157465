"""Description of a model's parameters, as far as layouts of its state need it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ParamSpec:
    """One trainable parameter of the whole model.

    Args:
        expert: its expert's global id, None if it is dense.
        rows: of a matrix, its first dimension; 1 for a vector.
    """

    name: str
    numel: int
    expert: int | None
    rows: int = 1

    def __post_init__(self) -> None:
        if self.numel < 1:
            raise ValueError(f"parameter {self.name} has {self.numel} elements; it needs at least one")
