"""Byte-level BPE with one special token, `<|document|>`, which stands at the start of every document.

Byte-level: any text can be encoded and decoded back exactly, there is no unknown token (Sennrich, Haddow and Birch,
2016; the byte alphabet is GPT-2's). Saved as the `tokenizer.json` of the `tokenizers` library.

A tokenizer of somebody else has another border: what the files beside its `tokenizer.json` name as `bos_token`, else
as `eos_token`. It is saved with a `tokenizer_config.json` that names it.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from orchestrator.errors import DataError

DOCUMENT_TOKEN = "<|document|>"
CONFIG = "tokenizer_config.json"  # names the border, if it isn't DOCUMENT_TOKEN
BORDER_FILES = (CONFIG, "generation_config.json", "config.json")
MIN_VOCAB_SIZE = 257  # 256 bytes and the document token


class TextTokenizer:
    """Text to token numbers and back.

    Attributes:
        vocab_size: the highest token's number and 1; training on little text may find fewer than were asked for.
        document_token: number of the token that starts a document.
        digest: sha256 of the saved form, and of the border where that is another's.
    """

    def __init__(self, saved: bytes, border: str = DOCUMENT_TOKEN) -> None:
        """Restores a tokenizer from the bytes that `to_bytes` gave, or that somebody else has saved.

        Raises:
            DataError: they are no tokenizer, or one without the token `border`.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(saved.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception for every malformed file
            raise _not_ours(str(error)) from error
        document_token = self._tokenizer.token_to_id(border)
        if document_token is None:
            raise _not_ours(f"it has no token {border}")
        # A text that holds these characters must not start a document; the saved form doesn't keep this setting.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()  # what somebody else has set for their own purpose
        self._tokenizer.no_padding()
        self._saved, self._border = saved, border
        self.document_token: int = document_token
        self.vocab_size: int = max(self._tokenizer.get_vocab().values()) + 1
        self.digest = hashlib.sha256(saved + (b"" if border == DOCUMENT_TOKEN else border.encode())).hexdigest()

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
        """Reads a `tokenizer.json` of ours or of somebody else.

        Raises:
            DataError: it is none, or it isn't ours and nothing beside it names a token that could begin a document.
            OSError: it can't be read.
        """
        saved = path.read_bytes()
        return cls(saved, _border_of(path, saved))

    def save(self, path: Path) -> None:
        """Writes `path`, and where the border is another's, a `tokenizer_config.json` beside it that names it."""
        path.write_bytes(self._saved)
        if self._border != DOCUMENT_TOKEN:
            path.with_name(CONFIG).write_text(json.dumps({"bos_token": self._border, "eos_token": self._border}) + "\n")

    def to_bytes(self) -> bytes:
        return self._saved

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each document: the document token, then its text's."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [[self.document_token, *encoding.ids] for encoding in encodings]

    def encode_prompt(self, text: str) -> list[int]:
        """The tokens of a text that need not begin a document."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens, without document tokens; bytes that are no whole character become U+FFFD."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def stream(self) -> Callable[[int], str]:
        """Decodes one token after another, each call giving the text that became whole with its token."""
        stream = decoders.DecodeStream(skip_special_tokens=True)
        return lambda token: stream.step(self._tokenizer, token) or ""


def _border_of(path: Path, saved: bytes) -> str:
    try:
        known = tokenizers.Tokenizer.from_str(saved.decode("utf-8"))
    except Exception as error:  # the library raises bare Exception for every malformed file
        raise _not_ours(str(error)) from error
    if known.token_to_id(DOCUMENT_TOKEN) is not None:
        return DOCUMENT_TOKEN
    named = [
        _token_named(known, content, kind)
        for content in (_content(path.with_name(name)) for name in BORDER_FILES)
        for kind in ("bos", "eos")
    ]
    border: str | None = next((t for t in named if t is not None and known.token_to_id(t) is not None), None)
    if border is None:
        raise DataError(
            f"{path} has no token {DOCUMENT_TOKEN}, and none of {', '.join(BORDER_FILES)} beside it names one of its "
            "tokens as bos_token or eos_token; a document must begin with a token of its own",
            remedy=f'Write {{"eos_token": "…"}} with one of its special tokens into {path.with_name(CONFIG)}.',
            unchanged="Nothing was started.",
        )
    return border


def _token_named(known: tokenizers.Tokenizer, content: dict[str, Any], kind: str) -> str | None:
    """The token that a file names, by itself or by its number."""
    token, number = content.get(f"{kind}_token"), content.get(f"{kind}_token_id")
    if isinstance(token, dict):  # as older versions of transformers write it
        token = token.get("content")
    if isinstance(token, str):
        return token
    if isinstance(number, list) and number:  # several that may end a document
        number = number[0]
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        return None
    named: str | None = known.id_to_token(number)
    return named


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} can't be read: {error}", remedy="Mend it.", unchanged="Nothing was started."
        ) from error
    return content if isinstance(content, dict) else {}


def _not_ours(why: str) -> DataError:
    return DataError(
        f"this is no tokenizer.json that can be used: {why}",
        remedy="If it belongs to a token store, remove that and prepare the data again; else name another tokenizer.",
        unchanged="Nothing was written.",
    )
