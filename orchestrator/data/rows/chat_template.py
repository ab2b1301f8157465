"""Chats as text, by a Jinja template as transformers has it, and what of the text the assistant says.

`strftime_now` gives a fixed date: today's would make other rows of the same data tomorrow.

A template marks what the assistant says by `{% generation %}`, as in transformers. In one without these marks it is
what a turn adds to the text of the turns before it with the prompt for an answer: that takes a template which renders a
chat's beginning as the beginning of the chat.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from orchestrator.errors import DataError

Message = Mapping[str, Any]

TODAY = datetime(2024, 7, 26)  # that of Llama's templates where there is no date
START, END = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}"
    f"{START}{{{{ message['role'] }}}}\n"
    "{% if message['role'] == 'assistant' %}"
    f"{{% generation %}}{{{{ message['content'] }}}}{END}\n"
    "{% endgeneration %}"
    f"{{% else %}}{{{{ message['content'] }}}}{END}\n"
    "{% endif %}{% endfor %}"
    f"{{% if add_generation_prompt %}}{START}assistant\n{{% endif %}}"
)
# For a tokenizer without ChatML's tokens: an answer ends with the token that begins documents.
PLAIN = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}\n{% endgeneration %}"
    "{% else %}{{ message['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class RenderedChat(NamedTuple):
    """Text of a chat, and the parts [start, stop) of it, in characters, that the assistant says."""

    text: str
    spans: tuple[tuple[int, int], ...]


class ChatTemplate:
    """A template, compiled.

    Args:
        source: Jinja.
        tokens: special tokens by the names under which templates use them, such as `bos_token`.

    Raises:
        DataError: it is no template.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        self._tokens, mark = dict(tokens), secrets.token_hex(8)
        self._begin, self._end = f"\x02{mark}\x03", f"\x03{mark}\x02"
        self.marks_assistant = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = TODAY.strftime
        environment.globals["_begin"], environment.globals["_end"] = self._begin, self._end
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise _refused(f"the chat template can't be read: {error}") from error

    def render(self, messages: Sequence[Message], prompt: bool = False) -> RenderedChat:
        """The text of a chat.

        Args:
            prompt: end with what comes before an answer of the assistant's.

        Raises:
            DataError: the template refuses the chat.
        """
        try:
            marked = self._template.render(messages=messages, add_generation_prompt=prompt, tools=None, **self._tokens)
        except Exception as error:  # of any kind: a template is a program
            raise _refused(f"the chat template refuses the chat: {error or type(error).__name__}") from error
        begin, end = self._begin, self._end
        text, spans, opened = "", [], 0
        for piece in re.split(f"({begin}|{end})", marked):
            if piece == begin:
                opened = len(text)
            elif piece == end:
                spans.append((opened, len(text)))
            else:
                text += piece
        return RenderedChat(text, tuple(spans))

    def chat(self, messages: Sequence[Message]) -> RenderedChat:
        """The text of a chat, with what the assistant says.

        Raises:
            DataError: the template refuses the chat, or neither marks nor shows what the assistant says.
        """
        whole = self.render(messages)
        if self.marks_assistant:
            return whole
        spans = []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = self.render(messages[:turn], prompt=True).text, self.render(messages[: turn + 1]).text
            if not (after.startswith(before) and whole.text.startswith(after)):
                raise _refused(
                    f"the chat template renders turn {turn + 1} differently if it is alone, so what the assistant "
                    "says in it is not known",
                    "Mark that in the template by {% generation %} and {% endgeneration %}: data.chat_template.",
                )
            spans.append((len(before), len(after)))
        return RenderedChat(whole.text, tuple(spans))

    def completion(self, asked: Sequence[Message], answer: Sequence[Message]) -> RenderedChat:
        """The text of a chat of which the last turns are an answer, with where that begins.

        Raises:
            DataError: the template refuses the chat, or renders its beginning differently if it is alone.
        """
        before, whole = self.render(asked, prompt=True).text, self.render([*asked, *answer]).text
        if not whole.startswith(before):
            raise _refused(
                "the chat template renders a prompt differently before an answer, so the answer's beginning is unknown"
            )
        return RenderedChat(whole, ((len(before), len(whole)),))


class _Generation(Extension):
    """The tags `{% generation %}` and `{% endgeneration %}`."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """The block between the tags, between marks."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.Name(name, "load")]) for name in ("_begin", "_end"))
        return nodes.Scope([begin, *body, end]).set_lineno(line)


def messages_of(value: object) -> Sequence[Message]:
    """The chat in a row. Raises DataError if the value isn't one."""
    if not isinstance(value, list) or not value:
        raise _refused(f"a chat is a list of messages; found {_shown(value)}")
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise _refused(f"message {number} has no role and content; found {_shown(message)}")
    return value


def _to_json(value: Any, indent: int | None = None, **kwargs: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **kwargs)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _refused(message: str, remedy: str = "Correct it, or leave the row out.") -> DataError:
    return DataError(message, remedy=remedy, unchanged="No store was written.")
