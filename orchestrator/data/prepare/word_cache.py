"""Tokenisation with a cache of words, several times as fast as the tokenizer itself on one core.

A byte-level BPE splits a text into words and encodes each separately (Radford et al., 2019, whose pattern this is), and
most words of a text have occurred before. So the tokenizer encodes each word once, and a text's tokens are those of its
words in order. The library's own cache saves only the merges, which are 2 % of its time: the rest goes into splitting,
and into memory for the origin of each byte.

The pattern is evaluated here for ASCII, where it is unambiguous; the tokenizer encodes text with other characters as a
whole, up to the next place where no word can continue: white space after a printed ASCII character.
"""

import json
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.prepare.store_writer import token_dtype
from orchestrator.data.tokenizer import TextTokenizer

LARGEST_TABLE = 1 << 25  # bytes, about
ENTRY_BYTES = 200  # overhead of a word beyond its characters and tokens: two objects and their dict entry
_WORD = re.compile(r" ?[A-Za-z]+|'(?:[sdmt]|ll|ve|re)| ?[^\sA-Za-z0-9]+| ?[0-9]+|\s+(?!\S)|\s+", re.ASCII)
_LINE_END = re.compile(r"(?<=[!-~])(?=\n)")
_CUT = re.compile(r"(?<=[!-~])(?=[\t\n\r ])")


class WordCache(dict[str, bytes]):
    """Tokens of words, in the bytes of a part; a missing word is encoded and kept.

    `encode` is as `TextTokenizer.encode`, for a tokenizer that `has_words`. Holds about `largest` bytes at most.
    """

    def __init__(self, tokenizer: TextTokenizer, largest: int = LARGEST_TABLE) -> None:
        super().__init__()
        self._tokenizer, self._largest = tokenizer, largest
        self._dtype = np.dtype(token_dtype(tokenizer))
        self._first = np.array([tokenizer.document_token], self._dtype).tobytes()
        self.held_bytes = 0

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.unsignedinteger]]:
        """The tokens of each document: the document token, then its text's."""
        return [
            np.frombuffer(self._first + b"".join(map(self.__getitem__, words_of(text))), self._dtype) for text in texts
        ]

    def __missing__(self, word: str) -> bytes:
        if self.held_bytes > self._largest:
            self.clear()
            self.held_bytes = 0
        [[_, *tokens]] = self._tokenizer.encode([word])
        self[word] = found = np.array(tokens, self._dtype).tobytes()
        self.held_bytes += ENTRY_BYTES + 4 * len(word) + len(found)
        return found


def has_words(tokenizer: TextTokenizer) -> bool:
    """Whether a text's tokens are those of its `words_of`: for plain byte-level BPEs with GPT-2's pattern, as ours."""
    saved = json.loads(tokenizer.to_bytes())
    cutting, model = saved["pre_tokenizer"] or {}, saved["model"]
    return (
        saved["normalizer"] is None
        and cutting.get("type") == "ByteLevel"
        and cutting.get("use_regex", True)
        and not cutting["add_prefix_space"]
        and model.get("type") == "BPE"
        and not model.get("dropout")
        and all(token["special"] for token in saved["added_tokens"])  # others are found in texts
    )


def words_of(text: str) -> list[str]:
    """Split a text so that the tokens of the parts are those of the whole."""
    if text.isascii():
        return _WORD.findall(text)
    words: list[str] = []
    for line in _LINE_END.split(text):
        for part in [line] if line.isascii() else _CUT.split(line):
            words += _WORD.findall(part) if part.isascii() else [part]
    return words
