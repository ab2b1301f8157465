"""The `model.exits` section: layers after which a token may leave the model (early exits, arXiv:2207.07061).

An exit has no weights of its own: the final norm and the output matrix make its logits.
"""

from collections.abc import Iterator

from pydantic import Field

from orchestrator.spec.keys.section import Broken, Section
from orchestrator.spec.task import LM, SFT, TaskSpec

DEFAULT_WEIGHT = 0.25


class ExitsSpec(Section):
    """Early exits. All layers run in training, where exits learn beside the last layer; `model generate
    --early-exit` skips layers."""

    layers: tuple[int, ...] = Field(
        min_length=1, description="Numbers of layers after which a token may exit, such as [2, 4]: ascending."
    )
    loss_weights: tuple[float, ...] = Field(
        default_factory=lambda known: (DEFAULT_WEIGHT,) * len(known.get("layers", ())),
        description="For each exit the weight of its loss, which is added to the last layer's. Default: 0.25 each.",
    )

    def broken_rules(self) -> Iterator[Broken]:
        if any(layer < 1 for layer in self.layers) or list(self.layers) != sorted(set(self.layers)):
            rule = f"layers must be at least 1 and ascend, each named once; got {list(self.layers)}"
            yield Broken((("layers",),), rule)
        if len(self.loss_weights) != len(self.layers):
            sizes = f"{len(self.loss_weights)} and {len(self.layers)}"
            rule = f"loss_weights must have as many entries as layers; got {sizes}"
            yield Broken((("loss_weights",), ("layers",)), rule)
        if any(not 0 < weight <= 10 for weight in self.loss_weights):
            rule = f"loss_weights must be above 0, and at most 10; got {list(self.loss_weights)}"
            yield Broken((("loss_weights",),), rule)


def broken_exits(
    exits: ExitsSpec | None, num_layers: int | None, origin: str | None, selection: str
) -> Iterator[Broken]:
    """The rules between exits and other keys of the model that are broken.

    Args:
        num_layers: of the model; None: not known yet.
        origin: what builds the model, if that isn't our own.
        selection: of the experts that a token visits.
    """
    if exits is None:
        return
    if origin is not None:
        rule = f"exits must be null with a model of {origin}: they are between the layers of our own model"
        yield Broken((("exits",), ("impl",), ("entrypoint",)), rule)
    elif num_layers is not None and exits.layers and exits.layers[-1] >= num_layers:
        rule = (
            f"layers of exits must be less than num_hidden_layers, after which all tokens leave; got {exits.layers[-1]}"
        )
        yield Broken((("exits", "layers"), ("num_hidden_layers",)), f"{rule} and {num_layers}")
    if selection == "expert_choice":
        rule = "exits must be null with router.selection expert_choice: experts choose among tokens that have left"
        yield Broken((("exits",), ("router", "selection")), rule)


def broken_exit_task(exits: ExitsSpec | None, task: TaskSpec) -> Iterator[Broken]:
    """The rules between exits and the task that are broken."""
    if exits is not None and (task.entrypoint is not None or task.name not in (LM, SFT)):
        rule = f"exits need a task of next tokens, {LM} or {SFT}; got {task.entrypoint or task.name}"
        yield Broken((("model", "exits"), ("task", "entrypoint" if task.entrypoint else "name")), rule)
