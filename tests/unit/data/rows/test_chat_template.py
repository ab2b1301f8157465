"""Chats as text: the same text, tokens and masks as transformers makes of them."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from orchestrator.data.rows.chat_template import CHATML, END, START, ChatTemplate
from orchestrator.data.rows.chat_tokenizer import ChatTokenizer, template_beside
from orchestrator.data.tokenizer import TextTokenizer
from orchestrator.errors import DataError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Say naïve, twice — please 🙂"},
    {"role": "assistant", "content": "naïve naïve 🙂"},
    {"role": "user", "content": "And  again?\n"},
    {"role": "assistant", "content": " naïve\n\nonce more"},
]
INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% elif m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim }}{{ eos_token }}{% endgeneration %}"
    "{% else %}<<{{ m['content'] }}>>{% endif %}{% endfor %}"
)
MACRO = (
    "{%- macro said(text) -%}{{ text }}{%- endmacro -%}"
    "{%- for m in messages -%}\n"
    "  {%- if loop.index0 > 40 -%}{%- break -%}{%- endif -%}\n"
    "  {{- '<|im_start|>' + m.role + '\\n' -}}\n"
    "  {%- if m.role == 'assistant' -%}\n"
    "    {%- generation -%}{{- said(m.content) + '<|im_end|>\n' -}}{%- endgeneration -%}\n"
    "  {%- else -%}{{- said(m.content) + '<|im_end|>\\n' -}}{%- endif -%}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
TEMPLATES = {"chatml": CHATML, "instruct": INSTRUCT, "macro": MACRO}
TOKENS = {"bos_token": "<|document|>", "eos_token": END}


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    texts = [" ".join(str(message["content"]) for message in CHAT), "user assistant system naïve naïve"]
    return TextTokenizer.train(texts * 4, 320, (START, END))


def _unmarked(template: str) -> str:
    for tag in ("generation", "endgeneration"):
        template = template.replace(f"{{%- {tag} -%}}", "").replace(f"{{% {tag} %}}", "")
    return template


@pytest.mark.parametrize("is_marked", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_and_masks_are_those_of_transformers(name: str, is_marked: bool, tokenizer: TextTokenizer) -> None:
    """Also without marks, of which transformers makes no mask: what a turn adds to those before it is the same."""
    from tokenizers import Tokenizer

    library = Tokenizer.from_str(tokenizer.to_bytes().decode())
    theirs = PreTrainedTokenizerFast(tokenizer_object=library, chat_template=TEMPLATES[name], **TOKENS)
    wanted = theirs.apply_chat_template(CHAT, return_assistant_tokens_mask=True, return_dict=True)
    assert sum(wanted["assistant_masks"]) > 4
    template = ChatTemplate(TEMPLATES[name] if is_marked else _unmarked(TEMPLATES[name]), TOKENS)
    assert template.marks_assistant == is_marked
    rendered = template.chat(CHAT)
    assert rendered.text == theirs.apply_chat_template(CHAT, tokenize=False)
    tokens, is_said = ChatTokenizer(tokenizer).encode(rendered.text, rendered.spans)
    assert tokens == wanted["input_ids"]
    assert [int(said) for said in is_said] == wanted["assistant_masks"]
    asked = theirs.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert template.render(CHAT[:2], prompt=True).text == asked


def test_an_answer_begins_where_its_prompt_ends() -> None:
    rendered = ChatTemplate(CHATML, TOKENS).completion(CHAT[:2], CHAT[2:3])
    ((start, stop),) = rendered.spans
    assert rendered.text[start:stop] == f"naïve naïve 🙂{END}\n" and rendered.text[:start].endswith(
        f"{START}assistant\n"
    )


FORGETFUL = "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }};{% endif %}{% endfor %}"
REFUSED = {
    "no template": ("{% for m in %}", [], "can't be read"),
    "refuses": ("{{ raise_exception('roles must alternate') }}", CHAT, "roles must alternate"),
    "forgets earlier turns": (FORGETFUL, CHAT, "renders turn 3 differently if it is alone"),
    "reaches into Python": ("{{ messages.__class__.__mro__ }}", CHAT, "refuses the chat"),
}


@pytest.mark.parametrize(("source", "chat", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_rendered_is_refused(source: str, chat: list[dict[str, str]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ChatTemplate(source, {}).chat(chat)


def test_the_template_is_found_beside_the_tokenizer(tmp_path: Path) -> None:
    tokenizer, config = tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"
    assert template_beside(None, None) == template_beside(tokenizer, None) == (CHATML, {})
    config.write_text('{"eos_token": {"content": "</s>"}, "chat_template": "in the config", "pad_token": null}')
    assert template_beside(tokenizer, None) == ("in the config", {"eos_token": "</s>"})
    (tmp_path / "chat_template.jinja").write_text("in a file")
    assert template_beside(tokenizer, None)[0] == "in a file"
    (tmp_path / "mine.jinja").write_text("mine")
    assert template_beside(tokenizer, tmp_path / "mine.jinja")[0] == "mine"
    with pytest.raises(DataError, match=r"gone.jinja can't be read"):
        template_beside(tokenizer, tmp_path / "gone.jinja")
