"""Micro-batches of what is evaluated: halves of the rows, which have none in common."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.data.tokenizer import TextTokenizer
from orchestrator.inference.eval_batches import EVEN, ODD, WHOLE, text_batches
from orchestrator.protocol.child_process import Evaluation
from orchestrator.spec.job import JobSpec

LENGTH = 8


def _rows(corpus: Path, part: slice, max_rows: int | None, rows_at_once: int) -> list[tuple[int, ...]]:
    train = {"sequence_length": LENGTH, "micro_batch_size": rows_at_once, "global_batch_size": rows_at_once}
    # With expert_choice micro-batches have the size of training.
    router = {"selection": "expert_choice"}
    job = JobSpec.model_validate({"name": "halves", "train": train, "model": {"router": router}})
    tokenizer = TextTokenizer.train(["some words of a text"], 270)
    request = Evaluation("run", "checkpoint", corpus=str(corpus), max_rows=max_rows)
    found = list(text_batches(request, job, tokenizer, torch.device("cpu"), part))
    assert all(each.num_rows == len(each.batch["inputs"]) <= rows_at_once for each in found)
    assert all(each.num_units == int((each.batch["targets"] >= 0).sum()) for each in found)
    return [tuple(row) for each in found for row in each.batch["inputs"].tolist()]


@pytest.mark.parametrize("rows_at_once", [1, 2, 3, 5])
@pytest.mark.parametrize("max_rows", [None, 7, 2, 1])
def test_halves_share_no_row_and_miss_none(tmp_path: Path, rows_at_once: int, max_rows: int | None) -> None:
    numbers = np.random.default_rng(0).integers(0, 10**6, 40)
    corpus = tmp_path / "text.jsonl"
    corpus.write_text(json.dumps({"text": " ".join(map(str, numbers))}) + "\n")
    whole, even, odd = (_rows(corpus, part, max_rows, rows_at_once) for part in (WHOLE, EVEN, ODD))
    assert len(set(whole)) == len(whole) == (max_rows or len(whole)) and len(whole) > (5 if max_rows is None else 0)
    assert even == whole[::2] and odd == whole[1::2]
