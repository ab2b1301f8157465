"""The `task` section: what a run learns from its rows."""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue

from orchestrator.spec.keys.section import HERE, Broken, CodeDir, Section, broken_own_code, broken_unread, refuse

TaskName = Literal["lm", "sft", "dpo", "classification"]
LM: TaskName = "lm"
SFT: TaskName = "sft"
DPO: TaskName = "dpo"
CLASSIFICATION: TaskName = "classification"
DataFormat = Literal["text", "messages", "preference", "arrays"]
TEXT: DataFormat = "text"
MESSAGES: DataFormat = "messages"
PREFERENCE: DataFormat = "preference"
ARRAYS: DataFormat = "arrays"
UNITS = "units"  # column of arrays with the number of a row's units, for a task of the user's; 1 without it
OF_CHATS = (MESSAGES, PREFERENCE)  # rows are chats, which a tokenizer and a template turn into tokens
FORMATS: dict[TaskName, DataFormat] = {LM: TEXT, SFT: MESSAGES, DPO: PREFERENCE, CLASSIFICATION: ARRAYS}
USED_BY = {  # keys that not every task reads
    "assistant_only_loss": (SFT,),
    "beta": (DPO,),
    "label_smoothing": (DPO,),
    "num_classes": (CLASSIFICATION,),
    "inputs": (CLASSIFICATION,),
    "labels": (CLASSIFICATION,),
}


def entrypoint(name: str) -> str:
    """Validate the name of a function of the user's."""
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", name):
        raise refuse('must be "package.module:function"')
    return name


Entrypoint = Annotated[str, AfterValidator(entrypoint)]


class TaskSpec(Section):
    """The task. Units, over whose number a loss is a mean, are target tokens, pairs or rows."""

    name: TaskName = Field(
        default=LM,
        description="lm: predict the next token of text. sft: of chats, what the assistant says. dpo: of pairs of "
        "chats, prefer the chosen one (arXiv:2305.18290). classification: the class of a row of arrays.",
    )
    assistant_only_loss: bool = Field(
        default=True, description="Of sft: only what the assistant says has a loss, not the other turns."
    )
    beta: float = Field(
        default=0.1, gt=0, description="Of dpo: how strongly the model is held to the one that it started from."
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="Of dpo: share of the pairs whose order is taken to be wrong."
    )
    num_classes: int | None = Field(
        default=None, ge=2, description="Of classification: number of classes. null: as many as the data have."
    )
    inputs: str = Field(
        default="inputs", min_length=1, description="Of classification: column of the arrays that the model gets."
    )
    labels: str = Field(default="labels", min_length=1, description="Of classification: column of the class, from 0.")
    entrypoint: Entrypoint | None = Field(
        default=None,
        description='A function "package.module:function" that makes the task instead of a built-in one; it gets '
        "`options` (docs/tasks.md).",
    )
    options: dict[str, JsonValue] = Field(default={}, description="Keys for `entrypoint`, of your own choice.")
    code_dir: CodeDir = HERE

    @property
    def unit(self) -> str:
        """What a loss is a mean over, in the plural."""
        if self.entrypoint is not None:
            return "units"
        return {DPO: "pairs", CLASSIFICATION: "rows"}.get(self.name, "tokens")

    def broken_rules(self) -> Iterator[Broken]:
        if self.entrypoint is not None and self.name != LM:
            rule = f"entrypoint takes the place of a built-in task: leave name out; got {self.entrypoint}, {self.name}"
            yield Broken((("name",), ("entrypoint",)), rule)
        yield from broken_own_code(self.entrypoint, self.options, self.code_dir)
        yield from broken_unread(self, "name", [self.entrypoint or self.name], USED_BY)


def _task(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


TaskSetting = Annotated[TaskSpec, BeforeValidator(_task, json_schema_input_type=TaskSpec | TaskName)]
