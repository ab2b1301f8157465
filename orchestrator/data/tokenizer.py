"""Byte-level BPE with one special token, `<|document|>`, at the start of every document.

Byte-level: any text can be encoded and decoded back exactly, there is no unknown token (Sennrich, Haddow and Birch,
2016; the byte alphabet is GPT-2's). Saved as the `tokenizer.json` of the `tokenizers` library.

An imported tokenizer has another document token: the `bos_token`, or else the `eos_token`, named by the files beside
its `tokenizer.json`. It is saved with a `tokenizer_config.json` that names this token.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from orchestrator.errors import DataError
from orchestrator.storage.backends.location import Location, objects_at

DOCUMENT_TOKEN = "<|document|>"
CONFIG = "tokenizer_config.json"  # names the document token ("border") if it isn't DOCUMENT_TOKEN
BORDER_FILES = (CONFIG, "generation_config.json", "config.json")
MIN_VOCAB_SIZE = 257  # 256 bytes and the document token


class TextTokenizer:
    """Encodes text as token numbers, and decodes them.

    Attributes:
        vocab_size: the highest token number plus 1; training on little text may find fewer tokens than requested.
        document_token: number of the token that starts a document.
        digest: sha256 of the saved form, and of the border if it isn't DOCUMENT_TOKEN.
    """

    def __init__(self, saved: bytes, border: str = DOCUMENT_TOKEN) -> None:
        """Restore a tokenizer from the bytes of `to_bytes`, or from those of an imported tokenizer.

        Raises:
            DataError: the bytes are no tokenizer, or it lacks the token `border`.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(saved.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception for every malformed file
            raise _not_ours(str(error)) from error
        document_token = self._tokenizer.token_to_id(border)
        if document_token is None:
            raise _not_ours(f"it has no token {border}")
        # Special tokens spelled out in a text must not start a document; the saved form doesn't keep this setting.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()  # an imported tokenizer may have set both
        self._tokenizer.no_padding()
        self._saved, self._border = saved, border
        self.document_token: int = document_token
        self.vocab_size: int = max(self._tokenizer.get_vocab().values()) + 1
        self.digest = hashlib.sha256(saved + (b"" if border == DOCUMENT_TOKEN else border.encode())).hexdigest()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, special: Sequence[str] = ()) -> "TextTokenizer":
        """Train up to `vocab_size` tokens on `texts`, with further `special` ones. Raises DataError below
        MIN_VOCAB_SIZE."""
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
            special_tokens=[DOCUMENT_TOKEN, *special],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer.to_str(pretty=True).encode("utf-8"))

    @classmethod
    def load(cls, path: Location) -> "TextTokenizer":
        """Read a `tokenizer.json`, our own or imported.

        Raises:
            DataError: it is no tokenizer, or it is imported and no file beside it names a token to begin documents.
            OSError: it can't be read.
        """
        saved = objects_at(path.parent).get(path.name)
        return cls(saved, _border_of(path, saved))

    def save(self, path: Path) -> None:
        """Write `path`, and beside it a `tokenizer_config.json` if the border isn't DOCUMENT_TOKEN."""
        for name, data in self.files(path.name).items():
            path.with_name(name).write_bytes(data)

    def files(self, name: str) -> dict[str, bytes]:
        """Content of the files that `save` writes, by name; `name` is that of the tokenizer itself."""
        if self._border == DOCUMENT_TOKEN:
            return {name: self._saved}
        border = json.dumps({"bos_token": self._border, "eos_token": self._border}) + "\n"
        return {name: self._saved, CONFIG: border.encode()}

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
        """The text of tokens, without document tokens; bytes that form no whole character become U+FFFD."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def stream(self) -> Callable[[int], str]:
        """A function that decodes token by token: each call returns the text that its token completes."""
        stream = decoders.DecodeStream(skip_special_tokens=True)
        return lambda token: stream.step(self._tokenizer, token) or ""


def _border_of(path: Location, saved: bytes) -> str:
    try:
        known = tokenizers.Tokenizer.from_str(saved.decode("utf-8"))
    except Exception as error:  # the library raises bare Exception for every malformed file
        raise _not_ours(str(error)) from error
    if known.token_to_id(DOCUMENT_TOKEN) is not None:
        return DOCUMENT_TOKEN
    named = [
        _token_named(known, content, kind)
        for content in (content_of(path.parent / name) for name in BORDER_FILES)
        for kind in ("bos", "eos")
    ]
    border: str | None = next((t for t in named if t is not None and known.token_to_id(t) is not None), None)
    if border is None:
        raise DataError(
            f"{path} has no token {DOCUMENT_TOKEN}, and none of {', '.join(BORDER_FILES)} beside it names one of its "
            "tokens as bos_token or eos_token; a document must begin with a token of its own",
            remedy=f'Write {{"eos_token": "…"}} with one of its special tokens into {path.parent / CONFIG}.',
            unchanged="Nothing was started.",
        )
    return border


def _token_named(known: tokenizers.Tokenizer, content: dict[str, Any], kind: str) -> str | None:
    """The token that a file names, by its text or its number."""
    token, number = content.get(f"{kind}_token"), content.get(f"{kind}_token_id")
    if isinstance(token, dict):  # format of older versions of transformers
        token = token.get("content")
    if isinstance(token, str):
        return token
    if isinstance(number, list) and number:  # several EOS tokens
        number = number[0]
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        return None
    named: str | None = known.id_to_token(number)
    return named


def content_of(path: Location) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none. Raises DataError if it can't be read."""
    try:
        content = json.loads(objects_at(path.parent).get(path.name))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} can't be read: {error}",
            remedy="Correct it, or name another tokenizer.",
            unchanged="Nothing was started.",
        ) from error
    return content if isinstance(content, dict) else {}


def _not_ours(why: str) -> DataError:
    return DataError(
        f"this is no tokenizer.json that can be used: {why}",
        remedy="If it belongs to a token store, remove that and prepare the data again; else name another tokenizer.",
        unchanged="Nothing was written.",
    )
