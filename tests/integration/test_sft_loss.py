"""The loss of chats against transformers': the same weights, chats and template, by its own labels and mean."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from orchestrator.data.manifest import SPLITS
from orchestrator.data.rows.chat_template import CHATML, END, START
from orchestrator.data.rows.prepare_rows import prepare_rows
from orchestrator.data.tokenizer import TextTokenizer
from orchestrator.model.tasks.all_tasks import task_of
from orchestrator.spec.job import JobSpec
from orchestrator.submission.submission import with_pretrained
from orchestrator.worker.whole_models.whole_model import starting_model
from tests.integration.test_families import _saved
from tests.support.tasks import WORDS, write_chats
from tests.unit.data.rows.test_chat_template import _unmarked

LENGTH = 128
CPU = torch.device("cpu")


def _their_loss(directory: Path, model: torch.nn.Module, file: Path, assistant_only: bool) -> float:
    """The model's own loss of all chats in one batch."""
    library = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=library, chat_template=CHATML)
    chats = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    rows = [tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True) for chat in chats]
    shape = (len(rows), max(len(row["input_ids"]) for row in rows))
    ids, real = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, -100)
    for number, row in enumerate(rows):
        length, tokens = len(row["input_ids"]), torch.tensor(row["input_ids"])
        ids[number, :length], real[number, :length] = tokens, 1
        has_loss = torch.tensor(row["assistant_masks"]).bool() if assistant_only else torch.ones(length).bool()
        labels[number, :length] = torch.where(has_loss, tokens, -100)
    return float(model(input_ids=ids, attention_mask=real, labels=labels).loss)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3MoeForCausalLM"])
@pytest.mark.parametrize(
    ("is_marked", "assistant_only"),
    [(True, True), (False, True), (False, False)],
    ids=["by the template's marks", "by what a turn adds", "of all tokens"],
)
@torch.no_grad()
def test_the_loss_of_chats_is_that_of_transformers(
    tmp_path: Path, architecture: str, is_marked: bool, assistant_only: bool
) -> None:
    chats, directory = write_chats(tmp_path / "chats.jsonl", 24), tmp_path / "theirs"
    tokenizer = TextTokenizer.train([" ".join(WORDS), "user assistant say again"] * 4, 320, (START, END))
    theirs = _saved(architecture, directory, vocab_size=tokenizer.vocab_size, max_position_embeddings=LENGTH)
    tokenizer.save(directory / "tokenizer.json")
    (directory / "chat_template.jinja").write_text(CHATML if is_marked else _unmarked(CHATML))
    job = with_pretrained(
        JobSpec.model_validate(
            {
                "schema": "v1",
                "name": "chats",
                "task": {"name": "sft", "assistant_only_loss": assistant_only},
                "model": {"init_from": str(directory)},
                "data": {"source": str(chats), "holdout": 0.2},
                "train": {"sequence_length": LENGTH},
            }
        )
    )
    store = prepare_rows(job, tmp_path / "rows")
    model, task, total, units = starting_model(job, tokenizer.vocab_size, CPU), task_of(job.task), 0.0, 0
    for split in SPLITS:
        rows = store.read(split, np.arange(store.num_rows(split)))
        arrays = task.collate(rows, np.random.default_rng(0))
        total += float(task.loss(model, {key: torch.from_numpy(array) for key, array in arrays.items()}).total)
        units += store.manifest.splits[split].num_units
    wanted = _their_loss(directory, theirs, chats, assistant_only)
    assert total / units == pytest.approx(wanted, rel=1e-5)
    assert total / units != pytest.approx(_their_loss(directory, theirs, chats, not assistant_only), rel=1e-3)
