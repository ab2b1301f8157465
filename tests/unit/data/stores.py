"""Small stores for tests, written by the real writer."""

from collections.abc import Sequence
from pathlib import Path

from orchestrator.data.manifest import PrepareOptions, TextSource
from orchestrator.data.prepare.store_writer import StoreWriter, published
from orchestrator.data.store import TokenStore
from orchestrator.data.tokenizer import TextTokenizer

BYTES_ONLY = TextTokenizer.train([""], 257)


def write_store(directory: Path, train_lengths: Sequence[int], validation_lengths: Sequence[int] = (9,)) -> TokenStore:
    """A store of documents of these lengths in tokens; the tokens of a split count 1, 2, ... 200, 1, 2, ... and a
    document's first is the document token."""
    lengths = [*train_lengths, *validation_lengths]
    with published(directory) as partial:
        writer = StoreWriter(partial, BYTES_ONLY)
        for number, length in enumerate(lengths):
            split = "train" if number < len(train_lengths) else "validation"
            before = sum(lengths[:number] if split == "train" else lengths[len(train_lengths) : number])
            tokens = [1 + position % 200 for position in range(before, before + length)]
            writer.add(split, number, [BYTES_ONLY.document_token, *tokens[1:]])
        writer.finish(
            [TextSource(name="test", digest="0" * 64, num_documents=len(lengths), num_bytes=sum(lengths))],
            [f"document {number}" for number in range(len(lengths))],
            PrepareOptions(vocab_size=257, holdout=0.5, tokenizer_train_bytes=1),
        )
    return TokenStore.open(directory)
