"""Preparation of corpora of any size as a packed store: scan all records, train a tokenizer, encode blocks on the
cluster's nodes, assemble, publish.

    done = prepare_corpora(Request(("books.jsonl", "builtin:pydocs")), Path("data"), on_cluster)
    done.store.directory

The store has the same bytes on any nodes. The text is read twice, or three times if a tokenizer is trained: the store's
name needs a digest over all documents in order, the sampled share of a document depends on the amount of text, and only
then can anything be encoded. Keeping the text in between would take as much space again.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.manifest import Dropped, PrepareOptions, TextSource, store_key
from orchestrator.data.prepare.block_cache import Footer, Parts, checked, documents_in, lengths_of
from orchestrator.data.prepare.encode import (
    EncodeTask,
    SampleTask,
    encode_block,
    made_of,
    outcomes,
    sample_block,
    saved,
    signal_here,
)
from orchestrator.data.prepare.quarantine import Quarantine
from orchestrator.data.prepare.ray_map import Spread
from orchestrator.data.prepare.request import Progress, Request, check, load_tokenizer, options_of
from orchestrator.data.prepare.scan import Scan, scan
from orchestrator.data.prepare.store_writer import StoreWriter, published
from orchestrator.data.prepare.weights import surplus
from orchestrator.data.store import TokenStore
from orchestrator.data.tokenizer import TextTokenizer
from orchestrator.errors import DataNotWritten, StoreCorrupt


@dataclass(frozen=True)
class Done:
    """A store, new or found.

    Attributes:
        num_records, num_empty: records read in this preparation, and those of them without text.
        quarantine: the file that lists bad records and files without text; None if there are none.
    """

    store: TokenStore
    found: bool
    num_records: int
    num_empty: int
    quarantine: Path | None
    num_blocks: int


def prepare_corpora(
    request: Request, directory: Path, spread: Spread, progress: Progress | None = None, waits: bool = False
) -> Done:
    """The store of the request below `directory`, prepared if it doesn't exist.

    Args:
        spread: executes tasks: `on_cluster`, or `map` to work without a cluster.
        progress: called with a stage ("reading", "tokenizer", "encoding", "writing", "done") and the finished
            fraction of it.
        waits: wait for another process that prepares the same store; otherwise that is an error.

    Raises:
        DataError: a source that can't be read, too many bad records, an option out of range, or a document without a
            score.
        DataNotWritten: the directory can't be written.
        StoreCorrupt: the store exists and doesn't match its digests.
    """
    report = progress or (lambda stage, fraction: None)
    check(request)
    given = None if request.tokenizer is None else load_tokenizer(request.tokenizer)
    options = options_of(request, given)
    directory = directory.absolute()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _scratch(directory) as ids, _scratch(directory) as lines:
            quarantine = Quarantine(lines, directory)
            report("reading", 0.0)
            found = scan(
                request.sources,
                request.text_key,
                options,
                quarantine,
                ids,
                lambda fraction: report("reading", fraction),
                request.max_bad,
            )
            final = directory / store_key(found.digest, options)
            named = quarantine.save(final.with_name(f"{final.name}.quarantine.jsonl"))
            with Parts.held(final, waits) as parts:
                was_there = final.exists()
                if not was_there:
                    _Making(request, options, given, found, parts, spread, report).make(final, ids)
                parts.remove()
    except OSError as error:
        raise DataNotWritten(
            f"the token store can't be written to {directory}: {error}",
            remedy="Make room and the directory writable, or choose another one.",
            unchanged="No store was written; what is done is kept.",
        ) from error
    store = TokenStore.open(final, verify=True)
    report("done", 1.0)
    return Done(store, was_there, found.num_records, found.num_empty, named, len(found.blocks))


def _scratch(directory: Path) -> IO[str]:
    """A file without a name, so that it vanishes with the process, even after a crash."""
    return TemporaryFile("w+", encoding="ascii", dir=directory)


@dataclass(frozen=True)
class _Making:
    """Preparation of one store."""

    request: Request
    options: PrepareOptions
    given: TextTokenizer | None
    found: Scan
    parts: Parts
    spread: Spread
    tell: Progress

    def make(self, final: Path, ids: IO[str]) -> None:
        tokenizer = self.given or self.parts.tokenizer() or self._learned()
        path = self.parts.keep_tokenizer(tokenizer)
        self._encode(tokenizer, path)
        footers = self._footers(tokenizer)
        left_out_D = self._surplus(footers)
        with published(final, self.parts.assembly) as partial:
            writer = StoreWriter(partial, tokenizer, self.request.code_dir)
            try:
                self._write(writer, footers, left_out_D)
                ids.seek(0)
                writer.finish(self._sources(left_out_D), (json.loads(line) for line in ids), self.options)
            finally:
                writer.close()

    def _learned(self) -> TextTokenizer:
        share = min(1.0, self.options.tokenizer_train_bytes / self.found.num_bytes)
        tasks = [saved(SampleTask(block, share, self._held_out(block.number))) for block in self.found.blocks]
        texts: dict[int, tuple[str, ...]] = {}
        self.tell("tokenizer", 0.0)
        for outcome in outcomes(self.spread(sample_block, tasks)):
            texts[outcome.block] = outcome.texts
            self.tell("tokenizer", len(texts) / len(tasks))
        in_order = (text for block in sorted(texts) for text in texts[block])
        return TextTokenizer.train(in_order, self.request.vocab_size)

    def _held_out(self, number: int) -> tuple[int, ...]:
        block = self.found.blocks[number]
        flags = self.found.held_out[block.first_document : block.first_document + block.num_documents]
        return tuple(place for place, held_out in enumerate(flags) if held_out)

    def _encode(self, tokenizer: TextTokenizer, path: Path) -> None:
        signal = signal_here(self.options.difficulty)
        code_dir = str(self.request.code_dir.absolute())
        tasks = [
            saved(
                EncodeTask(block, str(self.parts.path_of(block.number)), str(path), tokenizer.digest, signal, code_dir)
            )
            for block in self.found.blocks
        ]
        done = 0
        self.tell("encoding", 0.0)
        for outcome in outcomes(self.spread(encode_block, tasks)):
            done += self.found.blocks[outcome.block].num_documents
            self.tell("encoding", done / self.found.num_documents)

    def _footers(self, tokenizer: TextTokenizer) -> list[Footer]:
        signal, footers = signal_here(self.options.difficulty), []
        for block in self.found.blocks:
            path = self.parts.path_of(block.number)
            footer = checked(path, made_of(block, tokenizer.digest, signal))
            if footer is None or footer.num_documents != block.num_documents:
                raise StoreCorrupt(
                    f"{path} was written, but is missing or damaged",
                    remedy="Start again: finished parts are kept. If it happens again, check the disk, and check "
                    "that every node has this directory under the same path.",
                    unchanged="No store was written.",
                )
            footers.append(footer)
        return footers

    def _surplus(self, footers: Sequence[Footer]) -> NDArray[np.bool_]:
        """Mask of the corpus's documents that are left out to meet the weights of sources."""
        left_out_D = np.zeros(self.found.num_documents, np.bool_)
        if self.options.weights is None:
            return left_out_D
        tokens_D = np.concatenate(
            [lengths_of(self.parts.path_of(number), footer) for number, footer in enumerate(footers)]
        )
        firsts = self.found.first_documents
        source_D = np.repeat(np.arange(len(firsts) - 1), np.diff(firsts))
        train_D = np.frombuffer(self.found.held_out, np.uint8) == 0
        ranks_D = np.frombuffer(self.found.ranks, np.float64)
        left_out_D[train_D] = surplus(self.options.weights, source_D[train_D], tokens_D[train_D], ranks_D[train_D])
        return left_out_D

    def _write(self, writer: StoreWriter, footers: Sequence[Footer], left_out_D: NDArray[np.bool_]) -> None:
        number = 0
        for block, footer in enumerate(footers):
            self.tell("writing", block / len(footers))
            for tokens, score in documents_in(self.parts.path_of(block), footer):
                if not left_out_D[number]:
                    writer.add("validation" if self.found.held_out[number] else "train", number, tokens, score)
                number += 1

    def _sources(self, left_out_D: NDArray[np.bool_]) -> list[TextSource]:
        sources = []
        for place, source in enumerate(self.found.sources):
            first, end = self.found.first_documents[place : place + 2]
            num_surplus = int(left_out_D[first:end].sum())
            if num_surplus:
                dropped = (source.dropped or Dropped()).model_copy(update={"surplus": num_surplus})
                source = source.model_copy(update={"dropped": dropped})
            sources.append(source)
        return sources
