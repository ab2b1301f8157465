"""The `data` section: the text to train on."""

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from orchestrator.spec.section import Broken, Section, directory, refuse

BUILTIN_CORPORA = ("stdlib", "pydocs")
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
    """The training text, and its conversion to tokens."""

    source: Annotated[str, AfterValidator(_source)] = Field(
        default="builtin:stdlib",
        description="`builtin:stdlib` (the running Python's own library), `builtin:pydocs` (Python's manual, from "
        "Debian's python3.13-doc), one file, or a folder of files: .txt or .jsonl, both also as .gz, .parquet or "
        ".arrow. If the datasets library saved the folder, its listed files are read in their order; of one with "
        "several splits, `train`. Or the directory of a store that `orchestrator data prepare` has written.",
    )
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
        if self.row_format == BY_DOCUMENT and self.isolate_documents:
            rule = "isolate_documents has no meaning with row_format: documents, a document per row: leave it out"
            yield Broken((("isolate_documents",), ("row_format",)), rule)
