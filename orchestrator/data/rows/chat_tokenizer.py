"""A tokenizer as chats need it: special tokens in the text are tokens, and each token knows its characters.

A chat's text is what its template makes, with all special tokens in it; none is added.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import tokenizers

from orchestrator.data.rows.chat_template import CHATML, END, PLAIN, START, ChatTemplate
from orchestrator.data.tokenizer import CONFIG, TextTokenizer, content_of
from orchestrator.errors import DataError
from orchestrator.storage.backends.location import Location, objects_at

TEMPLATE = "chat_template.jinja"  # beside a tokenizer
SAVED = "chat_template.json"  # in a store and with a run: the template, and the special tokens that it knows


class ChatTokenizer:
    """Encodes the text of chats."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer.to_bytes().decode())
        self._tokenizer.no_truncation()  # an imported tokenizer may have set both
        self._tokenizer.no_padding()

    @property
    def special(self) -> set[int]:
        """Numbers of the special tokens."""
        return {number for number, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}

    def encode(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """The tokens of a text, and of each whether any of its characters is in one of the spans [start, stop), which
        are in order."""
        try:
            encoded = self._tokenizer.encode(text, add_special_tokens=False)
        except TypeError as error:  # half of a surrogate pair, which JSON can hold and UTF-8 can't
            raise DataError(f"the text can't be encoded: {error}", unchanged="No store was written.") from error
        is_said, place = [], 0
        for begin, end in encoded.offsets:
            while place < len(spans) and spans[place][1] <= begin:
                place += 1
            is_said.append(place < len(spans) and spans[place][0] < max(end, begin + 1))
        return list(encoded.ids), is_said


class ChatPrompts:
    """Turns what a user says into the tokens of a chat that waits for an answer.

    Args:
        saved: content of the file SAVED.

    Attributes:
        ends: tokens that end an answer: all special ones.
    """

    def __init__(self, saved: bytes, tokenizer: TextTokenizer) -> None:
        content = json.loads(saved)
        self._template = ChatTemplate(content["template"], content["tokens"])
        self._tokenizer = ChatTokenizer(tokenizer)
        self.ends = {tokenizer.document_token, *self._tokenizer.special}

    @classmethod
    def load(cls, run_dir: Location, tokenizer: TextTokenizer) -> Self:
        """Those of a run. Raises OSError if its template can't be read."""
        return cls(objects_at(run_dir).get(SAVED), tokenizer)

    def encode(self, text: str) -> list[int]:
        """The tokens. Raises DataError if the template refuses the chat."""
        rendered = self._template.render([{"role": "user", "content": text}], prompt=True)
        return self._tokenizer.encode(rendered.text, ())[0]


def saved_template(source: str, tokens: Mapping[str, str]) -> bytes:
    """Content of the file SAVED."""
    return json.dumps({"template": source, "tokens": dict(tokens)}, ensure_ascii=False, indent=2).encode()


def template_beside(tokenizer: Path | None, given: Path | None) -> tuple[str, dict[str, str]]:
    """The source of a job's chat template, and the special tokens by the names under which templates use them.

    Args:
        tokenizer: file of the given tokenizer; None for one that is trained.
        given: file of a template, which comes before the one beside the tokenizer.

    Raises:
        DataError: a file can't be read.
    """
    config = content_of(tokenizer.with_name(CONFIG)) if tokenizer is not None else {}
    tokens = {name: text for name, value in config.items() if name.endswith("_token") and (text := _text(value))}
    named = config.get("chat_template")
    if isinstance(named, list):  # several, by name
        named = next(
            (each.get("template") for each in named if isinstance(each, dict) and each.get("name") == "default"), None
        )
    beside = None if tokenizer is None else tokenizer.with_name(TEMPLATE)
    path = given if given is not None else beside if beside is not None and beside.exists() else None
    if path is not None:
        try:
            return path.read_text(encoding="utf-8"), tokens
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"the chat template {path} can't be read: {error}",
                remedy="Correct data.chat_template.",
                unchanged="Nothing was started.",
            ) from error
    if isinstance(named, str):
        return named, tokens
    return _template_for(tokenizer, tokens)


def _template_for(tokenizer: Path | None, tokens: dict[str, str]) -> tuple[str, dict[str, str]]:
    """ChatML; for a given tokenizer that lacks its tokens a plain one, whose answers end with the document token."""
    if tokenizer is None or not tokenizer.exists():
        return CHATML, tokens
    known = TextTokenizer.load(tokenizer)
    library = tokenizers.Tokenizer.from_str(known.to_bytes().decode())
    if all(library.token_to_id(token) is not None for token in (START, END)):
        return CHATML, tokens
    return PLAIN, {**tokens, "eos_token": str(library.id_to_token(known.document_token))}


def _text(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
