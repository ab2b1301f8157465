"""Manifest and file names of a packed store. `manifest.json` is written last.

    STORE/manifest.json           a `StoreManifest`
    STORE/documents.jsonl         ids of the corpus's documents, one JSON string a line, in the corpus's order
    STORE/tokenizer.json          the tokenizer that made the tokens; with tokenizer_config.json if it was imported
    STORE/SPLIT.tokens            the tokens of a split's documents, back to back: little-endian integers, nothing else
    STORE/SPLIT.digests           the SHA-256 of each block of these tokens, in 32 bytes, back to back
    STORE/SPLIT.index.npy         one INDEX_DTYPE record per document of the split, in the order of the tokens

A store is independent of row length: it serves every sequence length.

Blocks are what a node fetches of a store in a bucket, and verifies. In a random order almost each row of a large corpus
is in a block of its own, and a row has some kB: at 200 rows a second on a node, blocks of 256 KiB are 50 MB/s, blocks
of 1 MiB 200 MB/s and of 4 MiB 800 MB/s (computed). Smaller ones than 256 KiB would save little time, as a request to a
bucket takes some 30 ms whatever it transfers, and cost more requests. Rows in sequence are fetched several blocks at
once. The digests are 1/8192 of the tokens, so they aren't in the manifest, which each process parses.
"""

import hashlib
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

FORMAT_VERSION: Literal[1] = 1
MANIFEST = "manifest.json"
DOCUMENTS = "documents.jsonl"
TOKENIZER = "tokenizer.json"
BLOCK_BYTES = 2**18  # of a tokens file; a multiple of a token's
DIGEST_BYTES = 32

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")

INDEX_DTYPE = np.dtype(
    [
        ("document", "<i8"),  # line of documents.jsonl, from 0
        ("offset", "<i8"),  # of its first token, in tokens
        ("length", "<i8"),  # in tokens, its document token included: at least 1
        ("score", "<f4"),  # difficulty, by the options' signal; NaN without one
    ]
)


def tokens_file(split: Split) -> str:
    return f"{split}.tokens"


def digests_file(split: Split) -> str:
    return f"{split}.digests"


def index_file(split: Split) -> str:
    return f"{split}.index.npy"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    optional: ClassVar[frozenset[str]] = frozenset()  # omitted when None, so that older stores keep their digest

    @model_serializer(mode="wrap")
    def _without_what_is_not_there(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in dump(self).items() if value is not None or key not in self.optional}


class PrepareOptions(_Record):
    """All inputs of a store's content besides the corpus."""

    vocab_size: int  # requested
    holdout: float  # fraction of documents in `validation`
    tokenizer_train_bytes: int  # the tokenizer learns from about this much text at most
    tokenizer: str | None = None  # digest of a given tokenizer; None to train one
    difficulty: str | None = None  # the signal that scores documents
    min_chars: int | None = None  # shorter documents are left out
    max_chars: int | None = None  # longer documents are left out
    deduplicate: bool | None = None  # documents with the text of an earlier one are left out
    weights: tuple[float, ...] | None = None  # shares of the sources in the training split's tokens

    optional: ClassVar[frozenset[str]] = frozenset({"min_chars", "max_chars", "deduplicate", "weights"})


class Dropped(_Record):
    """Number of a source's records that are not in the store, by reason."""

    shorter: int = 0  # than min_chars
    longer: int = 0  # than max_chars
    duplicates: int = 0
    bad: int = 0  # quarantined
    surplus: int = 0  # training documents beyond the source's weight

    @property
    def total(self) -> int:
        return self.shorter + self.longer + self.duplicates + self.bad + self.surplus


class TextSource(_Record):
    """A corpus of the store."""

    name: str
    digest: str  # digest and counts cover documents that were not dropped, and surplus ones
    num_documents: int
    num_bytes: int
    dropped: Dropped | None = None

    optional: ClassVar[frozenset[str]] = frozenset({"dropped"})


class FileDigest(_Record):
    num_bytes: int
    sha256: str


class SplitCounts(_Record):
    num_documents: int
    num_tokens: int


class StoreManifest(_Record):
    """The content of `manifest.json`. `files` names every other file of the store."""

    format_version: Literal[1]
    sources: tuple[TextSource, ...]
    options: PrepareOptions
    vocab_size: int  # the tokenizer's; may be less than requested
    tokenizer_digest: str
    token_dtype: Literal["<u2", "<u4"]
    splits: dict[Split, SplitCounts]
    files: dict[str, FileDigest]


def is_store(directory: Path) -> bool:
    """Whether the directory is a token store."""
    return (directory / MANIFEST).is_file() and (directory / DOCUMENTS).is_file()


def store_key(source_digest: str, options: PrepareOptions) -> str:
    """Directory name of a store, unique per corpus and options."""
    made_of = f"{FORMAT_VERSION}\n{source_digest}\n{options.model_dump_json(exclude_none=True)}"
    return "store-" + hashlib.sha256(made_of.encode("utf-8")).hexdigest()[:16]


def digest_file(path: Path) -> FileDigest:
    """Size and sha256 of a file, read in pieces. Raises OSError if it can't be read."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return FileDigest(num_bytes=file.tell(), sha256=sha256)


def block_digests(path: Path) -> bytes:
    """The digests of a file's blocks, back to back; the last block may be shorter than the others. Raises OSError."""
    with path.open("rb") as file:
        return b"".join(hashlib.sha256(block).digest() for block in iter(partial(file.read, BLOCK_BYTES), b""))
