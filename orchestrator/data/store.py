"""The packed token store, read side: a split's documents back to back, read as rows of any length.

Row r of a split at sequence length T covers its tokens [r * T, r * T + T]: T inputs, and as targets the same shifted by
one. Rows cross document borders; the loss doesn't: a document's first token is never a target.

Shape suffixes: R requested rows, T tokens of a row, U = T + 1, D documents of the split.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from orchestrator.data.manifest import (
    MANIFEST,
    SPLITS,
    TOKENIZER,
    FileDigest,
    Split,
    StoreManifest,
    digest_file,
    index_file,
    tokens_file,
)
from orchestrator.data.split_tokens import MappedTokens, Tokens
from orchestrator.data.tokenizer import TextTokenizer
from orchestrator.errors import DataError, StoreCorrupt
from orchestrator.sampling.chunks import Spans

M = TypeVar("M", bound=BaseModel)

IGNORED_TARGET = -100  # ignore_index of torch's cross_entropy


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows in the form that a model takes."""

    inputs_RT: NDArray[np.int64]
    targets_RT: NDArray[np.int64]  # IGNORED_TARGET where the target is the first token of a document
    documents_RT: NDArray[np.int32]  # index of an input's document within its row, from 0
    lengths_R: NDArray[np.int64] | None = None  # if set, later tokens are padding: input 0, target ignored


@dataclass(frozen=True, eq=False)
class _SplitArrays:
    tokens: Tokens
    index_D: NDArray[np.void]  # memory-mapped, INDEX_DTYPE
    starts_D: NDArray[np.int64]  # the index's offsets, contiguous: searched every step


class TokenStore:
    """A prepared corpus. Make one with `prepare`, open it with `TokenStore.open`, or `open_store` if it may be in a
    bucket.

    Attributes:
        directory: the store's directory, or of one in a bucket that of its small files on this node.
        manifest: content of its `manifest.json`.
        digest: sha256 of the manifest, which covers everything in the store.
    """

    def __init__(self, directory: Path, manifest: StoreManifest, digest: str, tokens: Mapping[Split, Tokens]) -> None:
        self.directory = directory
        self.manifest = manifest
        self.digest = digest
        self._splits = {split: _split_arrays(directory, split, tokens[split]) for split in SPLITS}

    @classmethod
    def open(cls, directory: Path | str, verify: bool = False) -> "TokenStore":
        """Open a store in a directory, memory-mapped, after checking the sizes of its files; with `verify`, their
        digests too.

        Raises:
            DataError: there is no store.
            StoreCorrupt: a file doesn't match the manifest.
        """
        directory = Path(directory)
        manifest = read_manifest(directory, StoreManifest, "token store")
        for name, recorded in manifest.files.items():
            check_file(directory / name, recorded, verify)
        tokens = {split: MappedTokens(directory / tokens_file(split), manifest.token_dtype) for split in SPLITS}
        return cls(directory, manifest, digest_file(directory / MANIFEST).sha256, tokens)

    @property
    def vocab_size(self) -> int:
        return self.manifest.vocab_size

    @property
    def is_local(self) -> bool:
        """Whether all tokens are files of this machine, or are on a file system that it has mounted."""
        return all(isinstance(arrays.tokens, MappedTokens) for arrays in self._splits.values())

    def tokenizer(self) -> TextTokenizer:
        return TextTokenizer.load(self.directory / TOKENIZER)

    def num_tokens(self, split: Split) -> int:
        return len(self._splits[split].tokens)

    def index(self, split: Split) -> NDArray[np.void]:
        """The split's documents in the order of its tokens: (document, offset, length, score), read-only."""
        return self._splits[split].index_D

    def num_rows(self, split: Split, sequence_length: int) -> int:
        """Whole rows in a split; the tokens after the last one are never used at this length."""
        return (self.num_tokens(split) - 1) // _checked_length(sequence_length)

    def num_pieces(self, split: Split, longest: int) -> int:
        """Number of documents of a split, with longer ones split into pieces of `longest` tokens."""
        lengths_D = self.index(split)["length"].astype(np.int64)
        return int((-(-lengths_D // _checked_length(longest))).sum())

    def rows(self, split: Split, row_numbers: NDArray[np.int64], sequence_length: int) -> Rows:
        """Read rows in the given order, which may be empty. Raises ValueError for a row that doesn't exist."""
        return self.read(split, self.spans(split, row_numbers, sequence_length), sequence_length)

    def spans(self, split: Split, row_numbers: NDArray[np.int64], sequence_length: int) -> Spans:
        """Token spans of the rows' inputs. Raises ValueError for a row that doesn't exist."""
        starts_R = self._row_starts(split, row_numbers, sequence_length)
        return Spans(starts_R, np.full(len(starts_R), sequence_length))

    def read(self, split: Split, spans: Spans, sequence_length: int) -> Rows:
        """Read the inputs in `spans`, row by row, and for each the next token of its document.

        A row may consist of several spans; where a span doesn't continue the one before, attention may stop as at a
        document's border.

        Raises:
            ValueError: tokens that don't exist, or not whole rows.
            StoreCorrupt, OSError: as `Tokens.take`.
        """
        arrays = self._splits[split]
        places_RT = self._checked(split, spans).places().reshape(-1, _checked_length(sequence_length))
        following_RT = np.minimum(places_RT + 1, len(arrays.tokens) - 1)
        documents_RT = np.searchsorted(arrays.starts_D, places_RT, side="right")
        ends_RT = np.searchsorted(arrays.starts_D, following_RT, side="right") != documents_RT
        ends_RT |= following_RT == places_RT  # the split's last token
        breaks_RT = (np.diff(places_RT, axis=1) != 1) | (np.diff(documents_RT, axis=1) != 0)
        segments_RT = np.zeros(places_RT.shape, np.int32)
        segments_RT[:, 1:] = np.cumsum(breaks_RT, axis=1)
        inputs_RT, targets_RT = arrays.tokens.take(np.stack((places_RT, following_RT)))
        return Rows(
            inputs_RT=inputs_RT.astype(np.int64),
            targets_RT=np.where(ends_RT, IGNORED_TARGET, targets_RT.astype(np.int64)),
            documents_RT=segments_RT,
        )

    def read_padded(self, split: Split, spans: Spans) -> Rows:
        """Read each span as a row, padded to the longest; `spans` may be empty. Raises ValueError for tokens that don't
        exist."""
        longest = int(spans.length.max(initial=1))
        real_RT = np.arange(longest) < spans.length[:, None]
        read = self.read(split, spans, 1)
        rows = Rows(
            inputs_RT=np.zeros(real_RT.shape, np.int64),
            targets_RT=np.full(real_RT.shape, IGNORED_TARGET, np.int64),
            documents_RT=np.zeros(real_RT.shape, np.int32),
            lengths_R=spans.length,
        )
        rows.inputs_RT[real_RT] = read.inputs_RT[:, 0]
        rows.targets_RT[real_RT] = read.targets_RT[:, 0]
        return rows

    def fetch(self, split: Split, spans: Spans) -> bool:
        """Fetch what a later read of `spans` would have to wait for. Returns, and raises, as `Tokens.fetch`, and
        ValueError as `read`."""
        tokens, spans = self._splits[split].tokens, self._checked(split, spans)
        following = np.minimum(spans.start + spans.length, len(tokens) - 1)
        return tokens.fetch(np.concatenate((spans.places(), following)))

    def target_count(self, split: Split, spans: Spans) -> int:
        """Number of targets in `spans` that aren't ignored, without reading tokens. Raises ValueError as `read`."""
        arrays = self._splits[split]
        first_target = self._checked(split, spans).start + 1
        ends = np.searchsorted(arrays.starts_D, first_target + spans.length)
        borders = int((ends - np.searchsorted(arrays.starts_D, first_target)).sum())
        borders += int(np.sum(spans.start + spans.length == len(arrays.tokens)))  # the split's last token has no target
        return spans.num_tokens - borders

    def _checked(self, split: Split, spans: Spans) -> Spans:
        if len(spans.start):
            first, last = int(spans.start.min()), int((spans.start + spans.length).max()) - 1
            if first < 0 or last >= self.num_tokens(split):
                raise ValueError(
                    f"tokens {first} to {last} were asked for; {split} has {self.num_tokens(split)}, counted from 0"
                )
        return spans

    def _row_starts(self, split: Split, row_numbers: NDArray[np.int64], sequence_length: int) -> NDArray[np.int64]:
        num_rows = self.num_rows(split, sequence_length)
        rows_R = np.asarray(row_numbers, np.int64)
        if rows_R.size and not 0 <= rows_R.min() <= rows_R.max() < num_rows:
            raise ValueError(
                f"rows {rows_R.min()} to {rows_R.max()} were asked for; {split} has {num_rows} rows of "
                f"{sequence_length} tokens"
            )
        return rows_R * sequence_length


def _checked_length(sequence_length: int) -> int:
    if sequence_length < 1:
        raise ValueError(f"sequence_length is {sequence_length}; a row has at least 1 token")
    return sequence_length


def _split_arrays(directory: Path, split: Split, tokens: Tokens) -> _SplitArrays:
    index_D = mapped_array(directory / index_file(split))
    return _SplitArrays(tokens, index_D, np.ascontiguousarray(index_D["offset"]))


def mapped_array(path: Path) -> NDArray[Any]:
    """A NumPy file, memory-mapped. Raises StoreCorrupt."""
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except ValueError as error:  # a changed header of the same size
        raise _corrupt(path, f"{path} is no array: {error}") from error


def read_manifest(directory: Path, kind: type[M], what: str) -> M:
    """The manifest of a store. Raises DataError if the directory is none of `what`, StoreCorrupt."""
    path = directory / MANIFEST
    if not path.is_file():
        raise DataError(
            f"{directory} is no {what}: it holds no {MANIFEST}",
            remedy="Prepare the data first, or correct the path.",
            unchanged="Nothing was written.",
        )
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise _corrupt(path, f"{path} is damaged or of another version: {error}") from error


def check_file(path: Path, recorded: FileDigest, verify: bool) -> None:
    """Compare sizes, and with `verify` digests; a file of wrong size is digested too, for the message. Raises
    StoreCorrupt."""
    try:
        if not verify and path.stat().st_size == recorded.num_bytes:
            return
        found = digest_file(path)
    except OSError as error:
        raise _corrupt(path, f"{path} can't be read: {error.strerror}; its sha256 was {recorded.sha256}") from error
    if found != recorded:
        raise _corrupt(
            path,
            f"{path} has sha256 {found.sha256} and {found.num_bytes} bytes; {MANIFEST} has {recorded.sha256} and "
            f"{recorded.num_bytes} bytes",
        )


def _corrupt(path: Path, message: str) -> StoreCorrupt:
    return StoreCorrupt(
        message,
        remedy=f"Remove {path.parent} and start again: it is prepared anew from the corpus.",
        unchanged="Nothing was written.",
    )
