"""The optimizer of a job: its update rules, by parameter, and the learning rate over the steps."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import Field

from orchestrator.spec.keys.section import HERE, Broken, CodeDir, Section, broken_own_code, broken_unread
from orchestrator.spec.task import Entrypoint

RuleName = Literal["adamw", "sgd", "lion", "muon", "adafactor"]
ADAMW, SGD, LION, MUON, ADAFACTOR = "adamw", "sgd", "lion", "muon", "adafactor"
OF_MATRICES = (MUON, ADAFACTOR)  # rules that need a whole parameter at once
# Parts of parameters' names.
EMBEDDINGS, OUTPUTS, ROUTERS = {"wte", "wpe", "tokens"}, {"head", "lm_head"}, {"router", "gate"}
USED_BY = {  # keys that not every rule reads
    "betas": (ADAMW, LION, MUON),  # Muon leaves some parameters to AdamW
    "eps": (ADAMW, MUON),
    "momentum": (SGD, MUON),
    "nesterov": (SGD, MUON),
}


@dataclass(frozen=True)
class ParamSettings:
    """How one parameter is updated.

    Args:
        lr_scale: its learning rate over the job's.
        weight_decay: decoupled: the weight shrinks by this times its learning rate in each update.
    """

    rule: str
    lr_scale: float
    weight_decay: float

    @property
    def update(self) -> tuple[str, float]:
        """What all parameters of a bucket have in common."""
        return self.rule, self.lr_scale


class ParamGroupSpec(Section):
    """Settings of some parameters."""

    params: tuple[str, ...] = Field(
        min_length=1,
        description="Patterns of the parameters' names, such as layers.*.attention.* (fnmatch). A parameter belongs to "
        "the first group that has a pattern for it; a group without any is refused.",
    )
    name: RuleName | None = Field(default=None, description="Their update rule. null: the optimizer's.")
    lr_scale: float = Field(default=1.0, gt=0, description="Their learning rate over train.lr.")
    weight_decay: float | None = Field(
        default=None, ge=0, description="Their weight decay. null: as of parameters in no group."
    )


class OptimizerSpec(Section):
    """Update rules. Their formulas, with sources, are in `orchestrator/engine/optim/`."""

    name: RuleName = Field(
        default="adamw",
        description="The update rule. muon updates matrices, and leaves vectors, embeddings, routers and the output "
        "matrix to adamw; it takes the learning rate and weight decay of adamw. adafactor's learning rate is "
        "relative to the weights.",
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.95),
        description="Decay of the first and of the second moment; of lion, that of the update and of the momentum.",
    )
    eps: float = Field(default=1e-8, gt=0, description="Of adamw: added to the root of the second moment.")
    momentum: float = Field(default=0.95, ge=0, lt=1, description="Of sgd and muon.")
    nesterov: bool = Field(default=True, description="Of sgd and muon: look one step ahead along the momentum.")
    weight_decay: float = Field(
        default=0.1,
        ge=0,
        description="Decoupled weight decay, times the learning rate. Norms, biases, other vectors, embeddings and "
        "routers have none, unless a group gives them one.",
    )
    groups: tuple[ParamGroupSpec, ...] = Field(default=(), description="Other settings for some parameters.")

    def settings_of(self, name: str, shape: Sequence[int]) -> ParamSettings:
        """How the parameter of this name and shape is updated."""
        group, _ = self._first(name)
        rule: str = self.name if group is None or group.name is None else group.name
        if rule == MUON and not is_hidden_matrix(name, shape):
            rule = ADAMW
        decay = self.weight_decay if is_decayed(name, shape) else 0.0
        if group is not None and group.weight_decay is not None:
            decay = group.weight_decay
        return ParamSettings(rule, 1.0 if group is None else group.lr_scale, decay)

    @property
    def has_momentum(self) -> bool:
        """Whether a rule keeps a momentum of the gradients."""
        kept = {ADAMW: self.betas[0] > 0, SGD: self.momentum > 0, LION: True, MUON: True, ADAFACTOR: False}
        return any(kept.get(rule, True) for rule in self._rules())

    def _rules(self) -> set[str]:
        return {self.name, *(group.name for group in self.groups if group.name is not None)}

    def unmatched(self, names: Sequence[str]) -> list[str]:
        """Patterns of groups that are first in none of these names."""
        unused = {pattern for group in self.groups for pattern in group.params}
        return sorted(unused - {self._first(name)[1] for name in names})

    def left_by_muon(self, shapes: Mapping[str, Sequence[int]]) -> list[str]:
        """Patterns of groups with the rule muon that have parameters, by name and shape, and none that it updates."""
        found: dict[str, bool] = {}
        for name, shape in shapes.items():
            group, pattern = self._first(name)
            if group is not None and group.name == MUON:
                found[pattern] = found.get(pattern, False) or is_hidden_matrix(name, shape)
        return sorted(pattern for pattern, is_used in found.items() if not is_used)

    def _first(self, name: str) -> tuple[ParamGroupSpec | None, str]:
        """The first group that has a pattern for this name, and the pattern."""
        return next(((g, p) for g in self.groups for p in g.params if fnmatchcase(name, p)), (None, ""))

    def broken_rules(self) -> Iterator[Broken]:
        yield from broken_unread(self, "name", self._rules(), USED_BY)


def is_decayed(name: str, shape: Sequence[int]) -> bool:
    """Whether a parameter has weight decay by default: matrices but embeddings and routers, which their names show, as
    in GPT-2, Llama and DeepSeek."""
    parts = name.split(".")
    is_embedding = bool(EMBEDDINGS & {*parts}) or any("embed" in part for part in parts)
    return len(shape) > 1 and not is_embedding and not is_router(name)


def is_router(name: str) -> bool:
    """Whether a parameter is a router's: `router` in our model, `router` or `gate` in those of transformers. The gates
    of their MLPs have other names: `gate_proj`, `gate_up`, `shared_expert_gate`."""
    return bool(ROUTERS & {*name.split(".")})


def is_hidden_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether a parameter is a matrix within the layers. Muon updates these (https://kellerjordan.github.io/posts/muon/),
    and pruning makes elements of these zero."""
    return len(shape) == 2 and is_decayed(name, shape) and not OUTPUTS & {*name.split(".")}


class LrSchedulerSpec(Section):
    """The learning rate over the steps; `orchestrator.engine.optim.lr_schedule` computes it."""

    kind: Literal["constant", "linear", "cosine", "warmup_stable_decay"] = Field(
        default="cosine",
        description="Shape after the warm-up. warmup_stable_decay stays at lr until the last decay_steps.",
    )
    warmup_steps: int = Field(default=0, ge=0, description="Steps in which it rises linearly to lr.")
    decay_steps: int | None = Field(
        default=None,
        ge=1,
        description="Of warmup_stable_decay: steps in which it falls linearly at the end. null: a tenth of max_steps.",
    )
    final_fraction: float = Field(
        default=0.1, ge=0, le=1, description="The last step's learning rate over lr; not used with kind constant."
    )

    entrypoint: Entrypoint | None = Field(
        default=None,
        description='A function "package.module:function" of the step, from 0, and the number of steps that gives the '
        "learning rate over lr; `kind` and the other keys are then left out.",
    )
    code_dir: CodeDir = HERE

    def broken_rules(self) -> Iterator[Broken]:
        yield from broken_own_code(self.entrypoint, {}, self.code_dir)
        for key in ("kind", "warmup_steps", "decay_steps", "final_fraction"):
            if self.entrypoint is not None and getattr(self, key) != type(self).model_fields[key].default:
                rule = f"{key} is of a schedule of ours: leave it out with entrypoint; got {getattr(self, key)}"
                yield Broken(((key,), ("entrypoint",)), rule)
        if self.decay_steps is not None and self.kind != "warmup_stable_decay":
            rule = f"decay_steps is of kind warmup_stable_decay; got {self.decay_steps} for {self.kind}"
            yield Broken((("decay_steps",), ("kind",)), rule)


class EmaSpec(Section):
    """An exponential moving average of the weights."""

    decay: float = Field(
        default=0.999, gt=0, lt=1, description="Share of the old average in the new one, at each update."
    )
