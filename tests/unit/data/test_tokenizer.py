import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.tokenizer import DOCUMENT_TOKEN, MIN_VOCAB_SIZE, TextTokenizer
from orchestrator.errors import DataError

TEXTS = ["the cat sat on the mat, the rat sat on the hat\n" * 20, "def f(x):\n    return x\n" * 20]
TOKENIZER = TextTokenizer.train(TEXTS, 300)


@given(text=st.text())
def test_any_text_survives_a_round_trip(text: str) -> None:
    [tokens] = TOKENIZER.encode([text])
    assert tokens[0] == TOKENIZER.document_token
    assert max(tokens) < TOKENIZER.vocab_size
    assert TOKENIZER.decode(tokens) == text


def test_learnt_tokens_shorten_the_text() -> None:
    [tokens] = TOKENIZER.encode([TEXTS[0]])
    assert len(tokens) < len(TEXTS[0]) / 2


def test_a_text_cannot_forge_a_document_border() -> None:
    text = f"before {DOCUMENT_TOKEN} after"
    [tokens] = TOKENIZER.encode([text])
    assert tokens.count(TOKENIZER.document_token) == 1
    assert TOKENIZER.decode(tokens) == text


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "tokenizer.json")
    loaded = TextTokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.digest == TOKENIZER.digest
    text = f"the cat {DOCUMENT_TOKEN}"
    assert loaded.encode([text]) == TOKENIZER.encode([text])


def test_training_again_gives_the_same_bytes() -> None:
    assert TextTokenizer.train(TEXTS, 300).to_bytes() == TOKENIZER.to_bytes()
    assert TextTokenizer.train(TEXTS, 265).digest != TOKENIZER.digest


def test_little_text_gives_fewer_tokens_than_asked_for() -> None:
    assert TextTokenizer.train(["ab"], 1000).vocab_size == MIN_VOCAB_SIZE + 1


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(DataError, match="vocab_size is 256"):
        TextTokenizer.train(TEXTS, MIN_VOCAB_SIZE - 1)


@pytest.mark.parametrize("saved", [b"", b"{}", b"\xff", b'{"version": "1.0", "model": {"type": "BPE"}}'])
def test_a_damaged_file_is_refused(saved: bytes) -> None:
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        TextTokenizer(saved)


def test_a_tokenizer_without_document_token_is_refused() -> None:
    foreign = TOKENIZER.to_bytes().replace(DOCUMENT_TOKEN.encode(), b"<|other|>")
    with pytest.raises(DataError, match="has no token"):
        TextTokenizer(foreign)


def _foreign(directory: Path, beside: dict[str, object]) -> Path:
    """A tokenizer of somebody else, and what the files beside it say."""
    directory.mkdir()
    saved = TOKENIZER.to_bytes().replace(DOCUMENT_TOKEN.encode(), b"<|endoftext|>")
    (directory / "tokenizer.json").write_bytes(saved)
    for name, content in beside.items():
        (directory / name).write_text(json.dumps(content))
    return directory / "tokenizer.json"


END, SPACE = 0, TOKENIZER.encode([" "])[0][1]


@pytest.mark.parametrize(
    ("beside", "border"),
    [
        ({"tokenizer_config.json": {"bos_token": "Ġ", "eos_token": "<|endoftext|>"}}, SPACE),
        ({"tokenizer_config.json": {"bos_token": None, "eos_token": {"content": "<|endoftext|>"}}}, END),
        ({"config.json": {"bos_token_id": None, "eos_token_id": [SPACE, END]}}, SPACE),
        ({"config.json": {"eos_token_id": SPACE}, "generation_config.json": {"bos_token_id": END}}, END),
        ({"tokenizer_config.json": {"bos_token": "[absent]"}, "config.json": {"eos_token_id": END}}, END),
    ],
    ids=["bos first", "as older versions write it", "one of several numbers", "generation before model", "not known"],
)
def test_the_border_token_of_another_tokenizer_is_named_beside_it(
    tmp_path: Path, beside: dict[str, object], border: int
) -> None:
    tokenizer = TextTokenizer.load(_foreign(tmp_path / "foreign", beside))
    [tokens] = tokenizer.encode(["the cat"])
    assert tokens[0] == tokenizer.document_token == border
    assert tokenizer.decode(tokens[1:]) == "the cat"
    tokenizer.save(tmp_path / "tokenizer.json")
    again = TextTokenizer.load(tmp_path / "tokenizer.json")
    assert (again.document_token, again.digest) == (tokenizer.document_token, tokenizer.digest)


def test_the_digest_of_another_tokenizer_depends_on_its_border(tmp_path: Path) -> None:
    digests = {
        TextTokenizer.load(_foreign(tmp_path / str(number), {"config.json": {"eos_token_id": number}})).digest
        for number in (END, SPACE)
    }
    assert len(digests) == 2


@pytest.mark.parametrize("beside", [{}, {"config.json": {"bos_token_id": None, "eos_token_id": 99_999}}])
def test_a_tokenizer_without_any_border_is_refused(tmp_path: Path, beside: dict[str, object]) -> None:
    with pytest.raises(DataError, match="names one of its tokens as bos_token or eos_token") as caught:
        TextTokenizer.load(_foreign(tmp_path / "foreign", beside))
    assert "tokenizer_config.json" in caught.value.remedy


@given(text=st.text())
def test_a_stream_gives_the_same_text(text: str) -> None:
    tokens = TOKENIZER.encode_prompt(text)
    stream = TOKENIZER.stream()
    assert "".join(map(stream, tokens)) == text
