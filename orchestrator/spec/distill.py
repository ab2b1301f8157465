"""The `distill` section: a teacher, from whose predictions a run learns beside its own targets."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import AfterValidator, Field

from orchestrator.spec.keys.section import Broken, Path, Section, directory
from orchestrator.spec.task import LM, SFT, TaskSpec

# Tensors of the size of a chunk's logits that a loss with a teacher holds at once: logits and log-probabilities of both
# models, at the temperature too, and gradients.
LOGITS_HELD = 7
PREDICTION = ("teacher_ids", "teacher_logs", "teacher_rest")  # arrays of a batch that has predictions


class DistillSpec(Section):
    """Distillation. Each worker holds the whole teacher, without gradients, and runs it on its own micro-batches; or
    predictions that were computed once are read with the rows."""

    teacher: Annotated[str, AfterValidator(directory)] | None = Field(
        default=None,
        description="Directory of a model that transformers has saved or `model export` has written, of a checkpoint, "
        "or of a run, whose newest checkpoint is taken. It must have the vocabulary of the run, whose tokenizer it "
        "gives unless data.tokenizer names one.",
    )
    logits: Annotated[str, AfterValidator(directory)] | None = Field(
        default=None,
        description="In place of a teacher, the directory of its predictions that `data teach` has written, for the "
        "token store in data.source, rows of train.sequence_length tokens, and this temperature.",
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
        default="",
        pattern="^([0-9a-f]{64})?$",
        description="Set at submission: the SHA-256 of the teacher's weights, or of the manifest of its predictions.",
    )
    teacher_parameters: int = Field(
        default=0, ge=0, description="Set at submission: the number of parameters of the teacher that workers hold."
    )

    @property
    def directory(self) -> str:
        """Where the teacher, or what it predicts, is."""
        return self.teacher or self.logits or ""

    def broken_rules(self) -> Iterator[Broken]:
        if (self.teacher is None) == (self.logits is None):
            rule = "distill needs a teacher, or its logits, and not both; got "
            yield Broken((("teacher",), ("logits",)), rule + ("none" if self.teacher is None else "both"))
        if self.hidden_weight and self.logits is not None:
            rule = f"hidden_weight must be 0 with logits, which have no hidden states; got {self.hidden_weight:g}"
            yield Broken((("hidden_weight",), ("logits",)), rule)


def broken_distillation(
    distill: DistillSpec | None, task: TaskSpec, is_native: bool, has_curriculum: bool, is_packed: bool
) -> Iterator[Broken]:
    """The rules between a teacher and other sections that are broken.

    Args:
        is_native: whether the model is one of the package's own.
        is_packed: whether rows are of one length, each beginning where the one before ends.
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
    if distill.logits is not None:
        others: tuple[tuple[bool, Path, str], ...] = (
            (has_curriculum, ("curriculum",), "a curriculum"),
            (not is_packed, ("data", "row_format"), "other rows than packed ones"),
            (task.name == SFT, ("task", "name"), SFT),
        )
        for is_there, key, what in others:
            if is_there:
                rule = (
                    f"logits are of packed rows of one length of a text, and can't be used with {what}: name a teacher"
                )
                yield Broken((("distill", "logits"), key), rule)
