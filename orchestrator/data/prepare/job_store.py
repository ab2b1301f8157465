"""Token store of a job: found, or prepared in this process.

The store's directory is named by its inputs, so a repeat with the same corpus and options finds it:

    store = prepare("builtin:stdlib", vocab_size=2048, holdout=0.05, directory=Path("runs/data"))
"""

from pathlib import Path

from orchestrator.data.manifest import Split, is_store
from orchestrator.data.prepare.difficulty import HERE
from orchestrator.data.prepare.pipeline import prepare_corpora
from orchestrator.data.prepare.request import Progress, Request, check_holdout, load_tokenizer
from orchestrator.data.store import TokenStore
from orchestrator.data.tokenizer import TextTokenizer
from orchestrator.errors import DataError
from orchestrator.spec.data import DataSpec


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
    """The store of `source` below `directory`, prepared if it doesn't exist. Waits for another process that prepares
    the same one.

    Args:
        source: see `read_documents`; or the directory of a store, which is used unchanged.
        vocab_size, holdout, text_key, tokenizer, difficulty, code_dir: as for `Request`.
        directory: parent of stores, each in a directory named by its content. Created if missing.
        progress: called with a stage ("reading", "tokenizer", "encoding", "writing", "done") and its finished fraction.

    Raises:
        DataError: the corpus can't be read or split, an option is invalid or differs from the store's, or `directory`
            can't be written.
        StoreCorrupt: the store exists and doesn't match its digests.
    """
    if not is_store(Path(source)):
        request = Request(
            (source,),
            vocab_size,
            holdout,
            text_key,
            tokenizer,
            difficulty,
            deduplicate=False,
            max_bad=0.0,
            code_dir=code_dir,
        )
        return prepare_corpora(request, Path(directory), map, progress, waits=True).store
    check_holdout(holdout)
    given = None if tokenizer is None else load_tokenizer(tokenizer)
    store = TokenStore.open(source, verify=True)
    _check_agreement(store, vocab_size, holdout, given, difficulty)
    if progress is not None:
        progress("done", 1.0)
    return store


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
