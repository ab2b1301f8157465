"""The `data` section: the text, chats or arrays to train on."""

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, JsonValue

from orchestrator.spec.keys.section import HERE, Broken, CodeDir, Path, Section, broken_own_code, directory, refuse
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.task import (
    ARRAYS,
    CLASSIFICATION,
    FORMATS,
    OF_CHATS,
    PREFERENCE,
    TEXT,
    DataFormat,
    Entrypoint,
    TaskSpec,
)
from orchestrator.spec.train import TrainSpec

BUILTIN_CORPORA = ("stdlib", "pydocs")
BUILTIN = "builtin:stdlib"  # text that is read unless a job names another
BY_DOCUMENT = "documents"  # of data.row_format


def _source(source: str) -> str:
    kind, colon, name = source.partition(":")
    if kind == "builtin" and colon:
        if name not in BUILTIN_CORPORA:
            nearest = get_close_matches(name, BUILTIN_CORPORA, n=1) or BUILTIN_CORPORA
            raise refuse(f"must be a built-in corpus that exists (nearest: builtin:{nearest[0]}) or a path")
        return source
    return directory(source)


class DataSpec(Section):
    """The training data, and the conversion of text to tokens."""

    source: Annotated[str, AfterValidator(_source)] = Field(
        default=BUILTIN,
        description="`builtin:stdlib` (the running Python's own library), `builtin:pydocs` (Python's manual, from "
        "Debian's python3.13-doc), one file, or a folder of files: .txt or .jsonl, both also as .gz, .parquet or "
        ".arrow. If the datasets library saved the folder, its listed files are read in their order; of one with "
        "several splits, `train`. Or the directory of a store that `orchestrator data prepare` has written. Of tasks "
        "sft and dpo: rows with chats (docs/tasks.md); of classification: a folder that the datasets library saved.",
    )
    format: DataFormat | None = Field(
        default=None,
        description="What `source` holds, for a task of your own: text; messages, chats as sft reads them; preference, "
        "pairs of chats as dpo reads them; arrays, a folder that the datasets library saved. null: what the task "
        "reads, text for one of your own.",
    )
    entrypoint: Entrypoint | None = Field(
        default=None,
        description='A function "package.module:function" that gives the rows instead of `source`, as arrays by name; '
        "it gets the name of a split, and `options` (docs/tasks.md).",
    )
    options: dict[str, JsonValue] = Field(default={}, description="Keys for `entrypoint`, of your own choice.")
    code_dir: CodeDir = HERE
    text_key: str = Field(default="text", min_length=1, description="Key or column of the text, in files with rows.")
    vocab_size: int = Field(
        default=2048,
        ge=257,
        description="Largest vocabulary of the trained byte-level BPE tokenizer, including 256 bytes and one border "
        "token. Not used with a given tokenizer.",
    )
    tokenizer: Annotated[str, AfterValidator(directory)] | None = Field(
        default=None,
        description="A tokenizer.json to use instead of training one; the files beside it name the token that begins a "
        "document. null: the one of model.init_from, else a trained one.",
    )
    chat_template: Annotated[str, AfterValidator(directory)] | None = Field(
        default=None,
        description="Of chats: a file with the Jinja template that turns a chat into text, as transformers "
        "has it. null: the one beside the tokenizer, else ChatML.",
    )
    holdout: float = Field(default=0.05, gt=0, lt=1, description="Fraction of the documents kept for validation.")
    row_format: Literal["packed", "documents"] = Field(
        default="packed",
        description="packed: documents lie back to back and are divided into rows of one length, without padding. "
        "documents: a row is a document, or a piece of a long one, so rows are of unequal length; within a "
        "micro-batch they are padded to the longest.",
    )
    isolate_documents: bool = Field(
        default=False, description="true: attention stops at the borders of documents. The loss never crosses them."
    )

    def broken_rules(self) -> Iterator[Broken]:
        yield from broken_own_code(self.entrypoint, self.options, self.code_dir)
        if self.entrypoint is not None and self.source != BUILTIN:
            rule = f"entrypoint gives the rows instead of source: leave one out; got {self.entrypoint} and "
            yield Broken((("source",), ("entrypoint",)), rule + self.source)
        if self.row_format == BY_DOCUMENT and self.isolate_documents:
            rule = "isolate_documents has no meaning with row_format: documents, a document per row: leave it out"
            yield Broken((("isolate_documents",), ("row_format",)), rule)


def format_of(task: TaskSpec, data: DataSpec) -> DataFormat:
    """What the data are: that of the built-in task, or what the job names for one of the user's."""
    if data.entrypoint is not None:
        return ARRAYS
    return FORMATS[task.name] if task.entrypoint is None else data.format or TEXT


def broken_rows(task: TaskSpec, data: DataSpec, model: ModelSpec) -> Iterator[Broken]:
    """Rules between a task, its data, and the model."""
    of_task: Path = ("task", "name")
    data_format, name = format_of(task, data), task.entrypoint or task.name
    has_rows = data_format != TEXT
    if task.entrypoint is None and data.entrypoint is None and data.format not in (None, FORMATS[task.name]):
        rule = f"data.format is {FORMATS[task.name]} for task {task.name}, and need not be given; got {data.format}"
        yield Broken((("data", "format"), of_task), rule)
    if task.entrypoint is None and data.entrypoint is not None and task.name != CLASSIFICATION:
        rule = "rows of data.entrypoint need a task that knows them: classification, or one of your own, "
        yield Broken((of_task, ("data", "entrypoint")), f"{rule}task.entrypoint; got {task.name}")
    if task.entrypoint is None and task.name == CLASSIFICATION and model.entrypoint is None:
        rule = "task classification needs a model of your own, which maps rows to logits: set model.entrypoint"
        yield Broken((("model", "entrypoint"), of_task), rule)
    if has_rows and data.entrypoint is None and data.source.startswith("builtin:"):
        rule = f"data.source must name a file or a folder with the rows of task {name}; got {data.source}"
        yield Broken((("data", "source"), of_task), rule)
    of_files = {"holdout": 0.05, "tokenizer": None, "text_key": "text", "format": None}
    for key, default in of_files.items():
        if data.entrypoint is not None and getattr(data, key) != default:
            rule = f"data.{key} is of files, and the rows are those of data.entrypoint: leave it out"
            yield Broken((("data", key), ("data", "entrypoint")), rule)
    if data.chat_template is not None and data_format not in OF_CHATS:
        rule = f"data.chat_template is of tasks sft and dpo, and of data.format {' and '.join(OF_CHATS)}; got {name}"
        yield Broken((("data", "chat_template"), of_task), rule)
    for key, value in model.router.compares_tokens.items():
        of_router: Path = ("model", "router", key)
        if data.isolate_documents and key == "selection":
            rule = (
                f"isolate_documents must be false with model.router.selection {value}, which compares the tokens of all"
            )
            yield Broken((("data", "isolate_documents"), of_router), f"{rule} documents")
        if data_format == PREFERENCE:
            rule = (
                f"router.{key} must not be {value} for pairs: a row's experts depend on other rows then, and so does "
            )
            yield Broken((of_router, of_task), f"{rule}its comparison with the starting model")
    of_text = {"row_format": data.row_format == BY_DOCUMENT, "isolate_documents": data.isolate_documents}
    for key in [key for key, is_given in of_text.items() if is_given and has_rows]:
        rule = f"data.{key} is of text, and task {name} has rows: leave it out"
        yield Broken((("data", key), of_task), rule)


def broken_outputs(task: TaskSpec, model: ModelSpec) -> Iterator[Broken]:
    """The rule between a task's classes and the model's outputs."""
    if task.num_classes and model.vocab_size and model.vocab_size < task.num_classes:
        rule = f"vocab_size must be at least task.num_classes; got {model.vocab_size} and {task.num_classes}"
        yield Broken((("model", "vocab_size"), ("task", "num_classes")), rule)


def broken_training(
    train: TrainSpec, model: ModelSpec, data_format: DataFormat, has_curriculum: bool
) -> Iterator[Broken]:
    """Rules between training and the model or a task with rows."""
    if train.float8 and not model.is_native:
        rule = f"float8 must be false with a model of {model.origin}: it computes the products of our own model"
        yield Broken((("train", "float8"), ("model", "impl"), ("model", "entrypoint")), rule)
    if data_format == ARRAYS and not train.micro_batch_rows:
        rule = f"micro_batch_size must be a number of rows where rows have no tokens; got {train.micro_batch_size}"
        yield Broken((("train", "micro_batch_size"), ("task", "name")), rule)
    if has_curriculum and data_format != TEXT:
        rule = "a curriculum orders text, and the task has rows: leave one out"
        yield Broken((("curriculum",), ("task", "name")), rule)
