"""Preparation of a corpus as a packed token store: hold documents out, train a tokenizer, encode, publish.

The store's directory is named by its inputs, so a repeat with the same corpus and options finds it:

    store = prepare("builtin:stdlib", vocab_size=2048, holdout=0.05, directory=Path("runs/data"))
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from orchestrator.data.corpus.sources import Corpus, Document, open_corpus
from orchestrator.data.holdout import fraction_of, split_documents
from orchestrator.data.manifest import PrepareOptions, Split, TextSource, is_store, store_key
from orchestrator.data.prepare.difficulty import HERE
from orchestrator.data.prepare.store_writer import StoreWriter, published
from orchestrator.data.store import TokenStore
from orchestrator.data.tokenizer import TextTokenizer
from orchestrator.errors import DataError
from orchestrator.spec.job import DataSpec

Progress = Callable[[str, float], None]

TOKENIZER_TRAIN_BYTES = 8_000_000
_BATCH_CHARS = 1_000_000  # text encoded at once: enough to keep all cores busy


def prepare(
    source: str,
    vocab_size: int,
    holdout: float,
    directory: Path | str,
    progress: Progress | None = None,
    text_key: str = "text",
    tokenizer: Path | None = None,
    difficulty: str | None = None,
    code_dir: Path = HERE,
) -> TokenStore:
    """The store of `source` below `directory`, prepared if it doesn't exist.

    Args:
        source: see `open_corpus`; or the directory of a store, which is used unchanged.
        vocab_size: tokens to learn; little text may give fewer.
        holdout: fraction of documents in `validation`, in [0, 1); either split gets at least one.
        directory: parent of stores, each in a directory named by its content. Created if missing.
        text_key: key or column of the text in files with rows.
        tokenizer: a `tokenizer.json` to use instead of training one; `vocab_size` is then ignored.
        difficulty: the signal that scores documents (`orchestrator.data.prepare.difficulty`); None for no scores.
        code_dir: directory of a user's own signal.
        progress: called with a stage ("reading", "tokenizer", "encoding", "done") and its finished fraction.

    Raises:
        DataError: the corpus can't be read or split, an option is invalid or differs from the store's, or `directory`
            can't be written.
        StoreCorrupt: the store exists and doesn't match its digests.
    """
    report = progress or (lambda stage, fraction: None)
    check_holdout(holdout)
    given = None if tokenizer is None else load_tokenizer(tokenizer)
    if is_store(Path(source)):
        store = TokenStore.open(source, verify=True)
        _check_agreement(store, vocab_size, holdout, given, difficulty)
        report("done", 1.0)
        return store
    report("reading", 0.0)
    corpus = open_corpus(source, text_key)
    options = PrepareOptions(
        vocab_size=vocab_size if given is None else given.vocab_size,
        holdout=float(holdout),
        tokenizer_train_bytes=TOKENIZER_TRAIN_BYTES if given is None else 0,
        tokenizer=None if given is None else given.digest,
        difficulty=difficulty,
    )
    splits = split_documents(corpus.ids, holdout)
    final = Path(directory) / store_key(corpus.digest, options)
    if not final.exists():
        used = given or TextTokenizer.train(_training_texts(corpus, splits, options, report), vocab_size)
        try:
            with published(final) as partial:
                _write(corpus, splits, options, used, StoreWriter(partial, used, code_dir), report)
        except OSError as error:
            raise DataError(
                f"the token store can't be written to {directory}: {error}",
                remedy="Make room and the directory writable, or choose another storage.",
                unchanged="No store was written.",
            ) from error
    store = TokenStore.open(final, verify=True)
    report("done", 1.0)
    return store


def check_holdout(holdout: float) -> None:
    """Raises DataError if it is out of range."""
    if not 0 <= holdout < 1:
        raise DataError(
            f"data.holdout is {holdout}; it must be at least 0 and less than 1",
            remedy="Set it to the fraction of documents to validate on, such as 0.05.",
            unchanged="Nothing was written.",
        )


def load_tokenizer(path: Path) -> TextTokenizer:
    """The tokenizer of a job. Raises DataError if it can't be read or used."""
    try:
        return TextTokenizer.load(path)
    except DataError as error:
        if str(path) in error.message:
            raise
        raise DataError(
            f"data.tokenizer {path}: {error.message}", remedy=error.remedy, unchanged=error.unchanged
        ) from error
    except OSError as error:
        raise DataError(
            f"data.tokenizer {path} can't be read: {error.strerror}",
            remedy="Name a tokenizer.json as the tokenizers library writes it.",
            unchanged="Nothing was started.",
        ) from error


def check_enough(
    store: TokenStore,
    sequence_length: int,
    global_batch_size: int,
    min_validation_rows: int = 0,
    by_document: bool = False,
) -> None:
    """Refuse a store too small for a job: less than one global batch, or fewer validation rows than it needs.

    With `by_document`, a row is a document, or a piece of a long one.

    Raises:
        DataError: with the rows found, the rows needed, and a remedy.
    """
    wanted: tuple[tuple[Split, int, str], ...] = (
        ("train", global_batch_size, "one global batch"),
        ("validation", min_validation_rows, "validation"),
    )
    for split, needed, purpose in wanted:
        found = (store.num_pieces if by_document else store.num_rows)(split, sequence_length)
        if found < needed:
            smaller = "train.global_batch_size" if split == "train" else "eval.rows"
            raise DataError(
                f"the {split} split has {store.num_tokens(split)} tokens: {found} rows of {sequence_length} tokens, "
                f"and {purpose} needs {needed}",
                remedy=f"Add text to data.source, or make train.sequence_length or {smaller} smaller"
                + (", or data.holdout larger" if split == "validation" else ""),
                unchanged="Nothing was started.",
            )


def check_vocabulary(model_vocab_size: int | None, tokenizer_vocab_size: int) -> None:
    """Raises DataError if the tokenizer has tokens without rows in the model. None: the model follows the tokenizer."""
    if model_vocab_size is not None and model_vocab_size < tokenizer_vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer_vocab_size} tokens, the model has rows for {model_vocab_size} only "
            "(model.vocab_size)",
            remedy="Name the model's own tokenizer (data.tokenizer), or make model.vocab_size larger.",
            unchanged="Nothing was started.",
        )


def sample_of(document: Document, share: float) -> str:
    """A share of a document, at a position given by a hash of its id."""
    length = math.ceil(len(document.text) * share)
    start = int(fraction_of(document.id) * (len(document.text) - length + 1))
    return document.text[start : start + length]


def _check_agreement(
    store: TokenStore, vocab_size: int, holdout: float, given: TextTokenizer | None, difficulty: str | None
) -> None:
    """Raises DataError if a job's options differ from the store's. Options left at their defaults are not compared."""
    options, made = DataSpec(), store.manifest.options
    wanted: list[tuple[str, object, object]] = []
    if given is not None:
        wanted.append(("the digest of data.tokenizer", given.digest, store.manifest.tokenizer_digest))
    elif vocab_size != options.vocab_size:
        wanted.append(("data.vocab_size", vocab_size, made.vocab_size))
    if holdout != options.holdout:
        wanted.append(("data.holdout", holdout, made.holdout))
    if difficulty is not None:
        wanted.append(("curriculum.signal", difficulty, made.difficulty or "none"))
    for key, asked, found in wanted:
        if asked != found:
            raise DataError(
                f"{key} is {asked}, and the store {store.directory} was prepared with {found}",
                remedy="Leave the key out, or prepare a store with `orchestrator data prepare` that has it.",
                unchanged="Nothing was started.",
            )


def _training_texts(
    corpus: Corpus, splits: Sequence[Split], options: PrepareOptions, report: Progress
) -> Iterator[str]:
    """Training text of the tokenizer: the same share of every training document."""
    share = min(1.0, options.tokenizer_train_bytes / corpus.num_bytes)
    for number, (document, split) in enumerate(zip(corpus, splits, strict=True)):
        if split == "train":
            yield sample_of(document, share)
        report("tokenizer", number / len(splits))


def _write(
    corpus: Corpus,
    splits: Sequence[Split],
    options: PrepareOptions,
    tokenizer: TextTokenizer,
    writer: StoreWriter,
    report: Progress,
) -> None:
    source = TextSource(
        name=corpus.name, digest=corpus.digest, num_documents=len(corpus.ids), num_bytes=corpus.num_bytes
    )
    try:
        number = 0
        for batch in _batches(corpus):
            for tokens in tokenizer.encode([document.text for document in batch]):
                writer.add(splits[number], number, tokens)
                number += 1
            report("encoding", number / len(splits))
        writer.finish([source], corpus.ids, options)
    finally:
        writer.close()


def _batches(documents: Corpus) -> Iterator[list[Document]]:
    """Batches of consecutive documents, at least `_BATCH_CHARS` long except for the last."""
    batch: list[Document] = []
    num_chars = 0
    for document in documents:
        batch.append(document)
        num_chars += len(document.text)
        if num_chars >= _BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch
