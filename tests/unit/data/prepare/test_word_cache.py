import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.data.prepare.word_cache import WordCache, has_words, words_of
from orchestrator.data.tokenizer import DOCUMENT_TOKEN, TextTokenizer

TEXTS = ["the cat's on the mat, they'll sit\n\n   there  till 1999\n" * 20, "def f(x):\n\treturn x — naïve\n" * 20]
TOKENIZER = TextTokenizer.train(TEXTS, 320)
TABLE = WordCache(TOKENIZER)
# Everything that the pattern tells apart, and what only looks like it: other spaces, digits, letters, marks, controls.
PARTS = "ab Z 'sdmtrvel 019 \n\t\r\x0b\x0c\x1c\x1f\0\x7f_.-!~ é ß Ω 中文 ٣ ² ½ Ⅷ ́ “’— \u0085\u00a0\u2028\u3000\ufeff😀"


def assert_same(texts: list[str], table: WordCache = TABLE) -> None:
    assert [tokens.tolist() for tokens in table.encode(texts)] == TOKENIZER.encode(texts)


@given(texts=st.lists(st.text(), max_size=4))
def test_tokens_are_those_of_the_tokenizer(texts: list[str]) -> None:
    assert_same(texts)


@given(text=st.text(alphabet=PARTS))
@example(text=f"before {DOCUMENT_TOKEN}{DOCUMENT_TOKEN} after")
@example(text="it's IT'S we're 'tis ''s ' s a'll\n")
@example(text="é \n\n  a’s b\u00a0\n c\u0085 d! \n é\n")
def test_tokens_are_those_of_the_tokenizer_where_it_matters(text: str) -> None:
    assert_same([text])
    assert "".join(words_of(text)) == text


@given(text=st.text(alphabet=[*map(chr, range(128)), *" \n'"], min_size=1))
def test_every_ascii_character_is_where_the_tokenizer_has_it(text: str) -> None:
    assert_same([text])


def test_a_full_word_cache_is_emptied() -> None:
    table = WordCache(TOKENIZER, largest=1000)
    for number in range(50):
        assert_same([f"the cat number {number} sat on x{'y' * number}", "é" * number], table)
        assert table.held_bytes < 5000


def altered(**changes: Any) -> TextTokenizer:
    saved = json.loads(TOKENIZER.to_bytes())
    return TextTokenizer(json.dumps(saved | changes).encode())


OTHERS = {
    "another pattern": {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}},
    "no pattern": {
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    },
    "a space before": {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}},
    "none": {"pre_tokenizer": None},
    "normalised": {"normalizer": {"type": "NFC"}},
    "chance": {"model": json.loads(TOKENIZER.to_bytes())["model"] | {"dropout": 0.1}},
    "found in texts": {
        "added_tokens": [
            *json.loads(TOKENIZER.to_bytes())["added_tokens"],
            {
                "id": 320,
                "content": "cat",
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": True,
                "special": False,
            },
        ]
    },
}


def test_ours_has_words() -> None:
    assert has_words(TOKENIZER)


@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS)
def test_others_have_none(changes: dict[str, Any]) -> None:
    assert not has_words(altered(**changes))
