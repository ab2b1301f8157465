"""The packed token store, write side: built in a hidden sibling directory, published by one rename.

A store under its final name is whole: every file was flushed to disk before the rename. Files left by a killed process
have hidden names, which are never opened.
"""

import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.manifest import (
    DOCUMENTS,
    FORMAT_VERSION,
    INDEX_DTYPE,
    MANIFEST,
    SPLITS,
    TOKENIZER,
    PrepareOptions,
    Split,
    SplitCounts,
    StoreManifest,
    TextSource,
    block_digests,
    digest_file,
    digests_file,
    index_file,
    tokens_file,
)
from orchestrator.data.prepare.difficulty import HERE, PairCounts, scores, signal_of
from orchestrator.data.tokenizer import TextTokenizer
from orchestrator.storage.atomic import flush, new_directory

INDEX_RECORD = struct.Struct("<qqqf")  # one INDEX_DTYPE record
COUNTED_AT_ONCE = 1 << 22  # tokens; np.bincount needs 8 bytes for each


class StoreWriter:
    """Writes the files of one store into an empty directory: `add` every document, then `finish`.

    It keeps the index in memory, 28 bytes per document.

    Args:
        code_dir: directory of a user's own scoring function.
    """

    def __init__(self, directory: Path, tokenizer: TextTokenizer, code_dir: Path = HERE) -> None:
        self._directory, self._code_dir = directory, code_dir
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer)
        self._tokens: dict[Split, BinaryIO] = {split: (directory / tokens_file(split)).open("xb") for split in SPLITS}
        self._num_tokens: dict[Split, int] = dict.fromkeys(SPLITS, 0)
        self._index: dict[Split, bytearray] = {split: bytearray() for split in SPLITS}

    def add(
        self,
        split: Split,
        document: int,
        tokens: Sequence[int] | NDArray[np.unsignedinteger],
        score: float = float("nan"),
    ) -> None:
        """Append a document to a split, after all with a lower number. `document` is its number in the corpus;
        `tokens` has at least one; `score` is NaN if it isn't known yet."""
        self._tokens[split].write(np.asarray(tokens, self._dtype).tobytes())
        self._index[split] += INDEX_RECORD.pack(document, self._num_tokens[split], len(tokens), score)
        self._num_tokens[split] += len(tokens)

    def close(self) -> None:
        for file in self._tokens.values():
            file.close()

    def finish(self, sources: Sequence[TextSource], document_ids: Iterable[str], options: PrepareOptions) -> None:
        """Write all files but the tokens, the manifest last, and flush everything to disk. Documents without a score
        are scored if the options name a signal. Raises DataError if one can't be scored."""
        self.close()
        with (self._directory / DOCUMENTS).open("w", encoding="ascii") as lines:
            lines.writelines(json.dumps(document_id) + "\n" for document_id in document_ids)
        for split in SPLITS:
            index_D = np.frombuffer(self._index[split], INDEX_DTYPE)
            if options.difficulty is not None and np.isnan(index_D["score"]).any():
                index_D["score"] = self._scores(split, index_D, options.difficulty)
            np.save(self._directory / index_file(split), index_D, allow_pickle=False)
            (self._directory / digests_file(split)).write_bytes(block_digests(self._directory / tokens_file(split)))
        self._tokenizer.save(self._directory / TOKENIZER)
        manifest = StoreManifest(
            format_version=FORMAT_VERSION,
            sources=tuple(sources),
            options=options,
            vocab_size=self._tokenizer.vocab_size,
            tokenizer_digest=self._tokenizer.digest,
            token_dtype=self._dtype,
            splits={
                split: SplitCounts(
                    num_documents=len(self._index[split]) // INDEX_RECORD.size, num_tokens=self._num_tokens[split]
                )
                for split in SPLITS
            },
            files={path.name: digest_file(path) for path in sorted(self._directory.iterdir())},
        )
        (self._directory / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        for path in self._directory.iterdir():
            flush(path)

    def _scores(self, split: Split, index_D: NDArray[np.void], name: str) -> NDArray[np.float64]:
        tokens = self._read(split)
        documents = (
            (document_id, tokens[offset : offset + length])
            for document_id, (_, offset, length, _) in zip(
                self._ids(index_D["document"]), index_D.tolist(), strict=True
            )
        )
        is_training = split == "train"
        signal = signal_of(name, self._tokenizer, self._counts, lambda: self._pairs, is_training, self._code_dir)
        return scores(signal, name, documents)

    def _ids(self, numbers_D: NDArray[np.int64]) -> Iterator[str]:
        """The ids of documents by their numbers, which are ascending."""
        with (self._directory / DOCUMENTS).open(encoding="ascii") as lines:
            before = -1
            for number in numbers_D.tolist():
                yield json.loads(next(islice(lines, number - before - 1, None)))
                before = number

    def _counts(self) -> NDArray[np.int64]:
        """Token counts of the training split."""
        tokens, counts_V = self._read("train"), np.zeros(self._tokenizer.vocab_size, np.int64)
        for start in range(0, len(tokens), COUNTED_AT_ONCE):
            counts_V += np.bincount(tokens[start : start + COUNTED_AT_ONCE], minlength=len(counts_V))
        return counts_V

    @cached_property
    def _pairs(self) -> PairCounts:
        """Token pair counts of the training split's documents, by which both splits are scored."""
        tokens, counts = self._read("train"), PairCounts(self._tokenizer.vocab_size)
        for _, offset, length, _ in INDEX_RECORD.iter_unpack(self._index["train"]):
            counts.add(tokens[offset : offset + length])
        return counts

    def _read(self, split: Split) -> NDArray[np.unsignedinteger]:
        if not self._num_tokens[split]:
            return np.empty(0, self._dtype)
        return np.asarray(np.memmap(self._directory / tokens_file(split), dtype=self._dtype, mode="r"))


@contextmanager
def published(final: Path, partial: Path | None = None) -> Iterator[Path]:
    """A directory to fill; it becomes `final` if the block succeeds, and is removed if it fails.

    If another process has published `final` meanwhile, that one stays: both have the same key.

    Args:
        partial: path of the new directory, on the same file system. None for one beside `final`.
    """
    try:
        with new_directory(final, partial) as filled:
            yield filled
    except OSError:
        if not final.is_dir():
            raise


def token_dtype(tokenizer: TextTokenizer) -> Literal["<u2", "<u4"]:
    """The smallest type for all token numbers."""
    return "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
