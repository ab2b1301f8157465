"""The `distill` section: a teacher, from whose predictions a run learns beside its own targets."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import AfterValidator, Field

from orchestrator.spec.keys.section import Broken, Section, directory
from orchestrator.spec.task import LM, SFT, TaskSpec


class DistillSpec(Section):
    """Distillation. Each worker holds the whole teacher, without gradients, and runs it on its own micro-batches."""

    teacher: Annotated[str, AfterValidator(directory)] = Field(
        description="Directory of a model that transformers has saved, or that `model export` has written. It must "
        "have the vocabulary of the run, whose tokenizer it gives unless data.tokenizer names one.",
    )
    temperature: float = Field(
        default=2.0, gt=0, le=100, description="Both distributions are made from logits divided by it."
    )
    alpha: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="The loss is (1 - alpha) * the task's loss + alpha * temperature² * the divergence from the "
        "teacher. 1: the teacher alone.",
    )
    hidden_weight: float = Field(
        default=0.0,
        ge=0,
        description="Weight of the distance (1 - cosine) between the final hidden states of both models, added to the "
        "loss. Both must have the same hidden_size.",
    )
    teacher_sha256: str = Field(
        default="", pattern="^([0-9a-f]{64})?$", description="Set at submission: the SHA-256 of the teacher's weights."
    )
    teacher_parameters: int = Field(
        default=0, ge=0, description="Set at submission: the number of the teacher's parameters."
    )


def broken_distillation(distill: DistillSpec | None, task: TaskSpec, is_native: bool) -> Iterator[Broken]:
    """The rules between a teacher and the task that are broken.

    Args:
        is_native: whether the model is one of the package's own.
    """
    if distill is None:
        return
    if task.entrypoint is not None or task.name not in (LM, SFT):
        named = task.entrypoint or task.name
        rule = f"distill needs a task of next tokens, {LM} or {SFT}; got {named}"
        yield Broken((("distill",), ("task", "entrypoint" if task.entrypoint else "name")), rule)
    if distill.hidden_weight and not is_native:
        rule = f"hidden_weight must be 0 with a model that returns logits alone; got {distill.hidden_weight:g}"
        yield Broken((("distill", "hidden_weight"), ("model",)), rule)
