"""The `train.pruning` section: weights that become zero while a run trains, and stay so.

By magnitude, on the schedule of Zhu and Gupta (arXiv:1710.01878, equation 1): a share s (1 - (1 - p)³) of the weights,
where s is the wanted share and p runs from 0 to 1 between the first and the last update that prunes.
"""

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Literal

from pydantic import Field

from orchestrator.spec.keys.section import Broken, Path, Section
from orchestrator.spec.optimizer import is_hidden_matrix

UNSTRUCTURED, TWO_OF_FOUR, NEURONS, HEADS = "unstructured", "2:4", "neurons", "heads"
STRUCTURED = (NEURONS, HEADS)
OF_FOUR = 4  # weights of a group, of which 2:4 leaves two
# Matrices of our model that have a part of each neuron of an MLP, or of each attention head, by their names.
_OF_STRUCTURE = {
    NEURONS: re.compile(r".+\.(gate_up|down)"),
    HEADS: re.compile(r".+\.attention\.(query|key|value|query_up|key_value|output)"),
}
ROUNDING = 1e-6  # shares are decimal: 0.29 of 100 is 29


class PruneTargetSpec(Section):
    """Weights that are pruned in one way."""

    pattern: Literal["unstructured", "2:4", "neurons", "heads"] = Field(
        description="unstructured: single weights, the smallest of each matrix. 2:4: two of each four neighbours of a "
        "row. neurons: inner neurons of MLPs and experts, equally many of each. heads: attention heads, each key/value "
        "head with its query heads, equally many in each layer. Neurons and heads leave the model when it is exported, "
        "or loaded to evaluate or to generate; they need our own model.",
    )
    sparsity: float = Field(
        default=0.5, gt=0, lt=1, description="Share that is pruned in the end; with 2:4 always 0.5."
    )
    params: tuple[str, ...] = Field(
        default=("*",),
        min_length=1,
        description="Of unstructured and 2:4, patterns of the matrices' names, such as layers.*.experts.* (fnmatch). "
        "Embeddings, the output matrix, routers, norms and biases are never pruned. A matrix belongs to the first "
        "target that has it.",
    )

    @property
    def is_structured(self) -> bool:
        """Whether whole neurons or heads are pruned."""
        return self.pattern in STRUCTURED

    def count(self, numel: int, progress: float = 1.0) -> int:
        """How many of so many weights, neurons or heads are pruned."""
        return int(self.sparsity * progress * numel + ROUNDING)

    def has(self, name: str, shape: Sequence[int]) -> bool:
        """Whether the parameter of this name and shape is pruned by it, unless an earlier target has it."""
        if self.pattern in _OF_STRUCTURE:
            return _OF_STRUCTURE[self.pattern].fullmatch(name) is not None
        return is_hidden_matrix(name, shape) and any(fnmatchcase(name, pattern) for pattern in self.params)

    def broken_rules(self) -> Iterator[Broken]:
        if self.pattern == TWO_OF_FOUR and self.sparsity != 0.5:
            rule = f"sparsity must be 0.5 with pattern 2:4; got {self.sparsity:g}"
            yield Broken((("sparsity",), ("pattern",)), rule)
        if self.is_structured and self.params != ("*",):
            rule = f"params must be left out with pattern {self.pattern}, which takes all of them; got "
            yield Broken((("params",), ("pattern",)), rule + ", ".join(self.params))


class PruningSpec(Section):
    """Pruning while a run trains. Updates are counted from 1; those that are skipped don't count."""

    targets: tuple[PruneTargetSpec, ...] = Field(min_length=1, description="What is pruned, and how.")
    start_step: int = Field(default=0, ge=0, description="Updates before pruning begins.")
    end_step: int = Field(ge=1, description="The last update that prunes: from then on the shares are the wanted ones.")
    every: int = Field(default=10, ge=1, description="Updates from one that prunes to the next.")

    def is_due(self, number: int) -> bool:
        """Whether an update, counted from 1, prunes."""
        passed = number - self.start_step
        return passed > 0 and number <= self.end_step and (passed % self.every == 0 or number == self.end_step)

    def has_begun(self, number: int) -> bool:
        """Whether an update before this one has pruned."""
        return number > min(self.start_step + self.every, self.end_step)

    def progress(self, number: int) -> float:
        """The part of the wanted share that is pruned after an update that prunes."""
        passed = (number - self.start_step) / (self.end_step - self.start_step)
        return 1.0 - (1.0 - min(max(passed, 0.0), 1.0)) ** 3

    def target_of(self, name: str, shape: Sequence[int]) -> PruneTargetSpec | None:
        """The target that a parameter belongs to."""
        return next((target for target in self.targets if target.has(name, shape)), None)

    def broken_rules(self) -> Iterator[Broken]:
        if self.start_step >= self.end_step:
            rule = f"start_step must be less than end_step; got {self.start_step} and {self.end_step}"
            yield Broken((("start_step",), ("end_step",)), rule)
        for pattern in STRUCTURED:
            places = [place for place, target in enumerate(self.targets) if target.pattern == pattern]
            if len(places) > 1:
                rule = f"targets must have pattern {pattern} once, as it takes all of them; got it {len(places)} times"
                yield Broken((("targets", places[1], "pattern"), ("targets", places[0], "pattern")), rule)


def broken_pruning(
    pruning: PruningSpec | None,
    origin: str | None,
    has_adapters: bool,
    norms_all_heads: bool,
    max_steps: int,
) -> Iterator[Broken]:
    """The rules between pruning and other sections that are broken.

    Args:
        origin: what builds the model, if that isn't our own.
        has_adapters: whether only adapters are trained.
        norms_all_heads: whether all heads have one norm.
        max_steps: updates of the run.
    """
    if pruning is None:
        return
    here: Path = ("train", "pruning")
    if has_adapters:
        rule = "pruning needs weights that are trained, and model.lora trains adapters beside them, which would fill "
        yield Broken((here, ("model", "lora")), f"{rule}pruned weights as they are merged")
    if pruning.end_step > max_steps:
        rule = f"end_step must be at most train.max_steps; got {pruning.end_step} and {max_steps}"
        yield Broken(((*here, "end_step"), ("train", "max_steps")), rule)
    for place, target in enumerate(pruning.targets):
        key: Path = (*here, "targets", place, "pattern")
        if target.is_structured and origin is not None:
            rule = f"pattern must be {UNSTRUCTURED} or {TWO_OF_FOUR} with a model of {origin}, whose {target.pattern} "
            yield Broken((key, ("model",)), f"{rule}aren't known; got {target.pattern}")
        if target.pattern == HEADS and norms_all_heads:
            rule = "pattern must not be heads with qk_norm: all_heads, whose mean is over all heads"
            yield Broken((key, ("model", "qk_norm")), rule)
