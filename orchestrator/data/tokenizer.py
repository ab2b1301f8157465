"""Byte-level BPE with one special token, `<|document|>`, which stands at the start of every document.

Byte-level: any text can be encoded and decoded back exactly, there is no unknown token (Sennrich, Haddow and Birch,
2016; the byte alphabet is GPT-2's). Saved as the `tokenizer.json` of the `tokenizers` library.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from orchestrator.errors import DataError

DOCUMENT_TOKEN = "<|document|>"
MIN_VOCAB_SIZE = 257  # 256 bytes and the document token


class TextTokenizer:
    """Text to token numbers and back.

    Attributes:
        vocab_size: tokens there are; training on little text may find fewer than were asked for.
        document_token: number of the token that starts a document.
        digest: sha256 of the saved form.
    """

    def __init__(self, saved: bytes) -> None:
        """Restores a tokenizer from the bytes that `to_bytes` gave. Raises DataError if they are none of ours."""
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(saved.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception for every malformed file
            raise _not_ours(str(error)) from error
        document_token = self._tokenizer.token_to_id(DOCUMENT_TOKEN)
        if document_token is None:
            raise _not_ours(f"it has no token {DOCUMENT_TOKEN}")
        # A text that holds these characters must not start a document; the saved form doesn't keep this setting.
        self._tokenizer.encode_special_tokens = True
        self._saved = saved
        self.document_token: int = document_token
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        self.digest = hashlib.sha256(saved).hexdigest()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "TextTokenizer":
        """Learns `vocab_size` tokens or fewer from `texts`. Raises DataError below MIN_VOCAB_SIZE."""
        if vocab_size < MIN_VOCAB_SIZE:
            raise DataError(
                f"data.vocab_size is {vocab_size}; a byte-level tokenizer needs at least {MIN_VOCAB_SIZE}",
                remedy=f"Set data.vocab_size to {MIN_VOCAB_SIZE} or more.",
                unchanged="Nothing was written.",
            )
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[DOCUMENT_TOKEN],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer.to_str(pretty=True).encode("utf-8"))

    @classmethod
    def load(cls, path: Path) -> "TextTokenizer":
        """Reads a `tokenizer.json`. Raises DataError if it isn't one of ours, OSError if it can't be read."""
        return cls(path.read_bytes())

    def save(self, path: Path) -> None:
        path.write_bytes(self._saved)

    def to_bytes(self) -> bytes:
        return self._saved

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each document: the document token, then its text's."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [[self.document_token, *encoding.ids] for encoding in encodings]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens, without document tokens; bytes that are no whole character become U+FFFD."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


def _not_ours(why: str) -> DataError:
    return DataError(
        f"this is no tokenizer.json of a token store: {why}",
        remedy="Remove the store that it belongs to and prepare the data again.",
        unchanged="Nothing was written.",
    )
