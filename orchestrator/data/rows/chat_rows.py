"""Chats, and pairs of them, as rows of tokens.

A row of a chat has its tokens but the last as `inputs`, and as `targets` the next of each, or `IGNORED_TARGET` where
that is not what the assistant says. A row of a pair has both of a chosen and of a rejected answer to the same prompt.

Shape legend: T = tokens of a chat.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.rows.chat_template import ChatTemplate, Message, RenderedChat, messages_of
from orchestrator.data.rows.chat_tokenizer import ChatTokenizer
from orchestrator.data.store import IGNORED_TARGET
from orchestrator.errors import DataError

CHAT, PROMPT, CHOSEN, REJECTED = "messages", "prompt", "chosen", "rejected"


@dataclass(frozen=True)
class TokenRow:
    """A row, how many targets count in it, its tokens, and whether it was cut to the longest that is taken."""

    arrays: Mapping[str, NDArray[np.int32]]
    num_targets: int
    num_tokens: int
    is_cut: bool


@dataclass(frozen=True)
class ChatEncoder:
    """Encodes rows of chats.

    Args:
        longest: tokens of the longest row; more are cut off at the end.
        assistant_only: only what the assistant says has targets.
    """

    template: ChatTemplate
    tokenizer: ChatTokenizer
    longest: int
    assistant_only: bool = True

    def chat(self, values: Mapping[str, Any]) -> TokenRow:
        """The row of a chat.

        Raises:
            DataError: it is no chat, or no target is left of it.
        """
        rendered = _said(values, self.template, self.assistant_only)
        row = self._encoded(
            rendered if self.assistant_only else RenderedChat(rendered.text, ((0, len(rendered.text)),))
        )
        if not row.num_targets:
            raise _refused(f"nothing that the assistant says is in the first {self.longest} tokens of the chat")
        return row

    def pair(self, values: Mapping[str, Any]) -> TokenRow:
        """The row of a pair of answers.

        Raises:
            DataError: it is no pair, both answers are equal, or nothing of one is left.
        """
        asked, chosen, rejected = prompt_and_answers(values)
        rows = {
            CHOSEN: self._encoded(self.template.completion(asked, chosen)),
            REJECTED: self._encoded(self.template.completion(asked, rejected)),
        }
        for name, row in rows.items():
            if not row.num_targets:
                raise _refused(f"nothing of the {name} answer is in the first {self.longest} tokens of the chat")
        arrays = {f"{name}_{kind}": array for name, row in rows.items() for kind, array in row.arrays.items()}
        return TokenRow(
            arrays,
            sum(row.num_targets for row in rows.values()),
            sum(row.num_tokens for row in rows.values()),
            any(row.is_cut for row in rows.values()),
        )

    def _encoded(self, rendered: RenderedChat) -> TokenRow:
        tokens, is_said = self.tokenizer.encode(rendered.text, rendered.spans)
        kept = slice(0, self.longest + 1)
        ids_T, said_T = np.asarray(tokens[kept], np.int32), np.asarray(is_said[kept], np.bool_)
        targets_T = np.where(said_T[1:], ids_T[1:], IGNORED_TARGET).astype(np.int32)
        arrays = {"inputs": ids_T[:-1], "targets": targets_T}
        is_cut = len(tokens) > self.longest + 1
        return TokenRow(arrays, int((targets_T != IGNORED_TARGET).sum()), len(targets_T), is_cut)


def check_chat(values: Mapping[str, Any], template: ChatTemplate, is_pair: bool, assistant_only: bool) -> None:
    """Raises DataError for a row that is no chat or pair, as far as that shows without a tokenizer."""
    if is_pair:
        asked, *answers = prompt_and_answers(values)
        for answer in answers:
            template.completion(asked, answer)
    else:
        _said(values, template, assistant_only)


def _said(values: Mapping[str, Any], template: ChatTemplate, assistant_only: bool) -> RenderedChat:
    rendered = template.chat(messages_of(_column(values, CHAT)))
    if assistant_only and not rendered.spans:
        raise _refused("the assistant says nothing in the chat")
    return rendered


def text_of(values: Mapping[str, Any], template: ChatTemplate) -> str:
    """The text of a chat, or of a pair's prompt and chosen answer, for a tokenizer to learn from. Raises DataError for
    a row that is neither."""
    if CHAT in values:
        return template.render(messages_of(values[CHAT])).text
    asked, chosen, _ = prompt_and_answers(values)
    return template.completion(asked, chosen).text


def prompt_and_answers(values: Mapping[str, Any]) -> tuple[Sequence[Message], Sequence[Message], Sequence[Message]]:
    """The prompt, the chosen and the rejected answer of a row, each as text or as messages. Without a prompt, or where
    both are chats that begin with one themselves, it is what both begin with.

    Raises:
        DataError: it is no pair, or both answers are equal.
    """
    chosen, rejected = (_turns(_column(values, name), "assistant") for name in (CHOSEN, REJECTED))
    prompt = [] if values.get(PROMPT) is None else _turns(values[PROMPT], "user")
    if prompt and all(turns[0]["role"] == "assistant" for turns in (chosen, rejected)):
        asked = prompt
    else:
        same = 0
        while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
            same += 1
        asked, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
        if any(turn not in asked for turn in prompt):
            raise _refused("the answers are whole chats, and don't both begin with the prompt")
    if not asked or not chosen or not rejected or chosen == rejected:
        raise _refused("a pair needs a prompt, and two answers that differ")
    return asked, chosen, rejected


def _turns(value: object, role: str) -> Sequence[Message]:
    return [{"role": role, "content": value}] if isinstance(value, str) else messages_of(value)


def _column(values: Mapping[str, Any], name: str) -> Any:
    if name not in values:
        raise _refused(f"no key {name!r}; it has {', '.join(map(repr, values)) or 'none'}")
    return values[name]


def _refused(message: str) -> DataError:
    return DataError(message, remedy="Correct it, or leave the row out.", unchanged="No store was written.")
