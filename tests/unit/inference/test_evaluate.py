"""What `model eval` reports of a text, whatever the task is."""

import json
import math
from pathlib import Path

import pytest
import torch

from orchestrator.data.tokenizer import TextTokenizer
from orchestrator.inference.evaluate import evaluate
from orchestrator.model.factory import build_model, single_rank
from orchestrator.protocol.child_process import Evaluation, EvaluationResult
from orchestrator.spec.job import JobSpec

OWN = '''
from orchestrator.model.task import Loss


class Twice:
    """The cross-entropy, counted twice."""

    metrics = ("rows",)

    def loss(self, model, batch):
        total = 2 * model(batch["inputs"], batch["targets"])
        rows = len(batch["inputs"])
        return Loss(total, metrics={"rows": (float(rows), 1.0)})


def task(options):
    return Twice()
'''


def _result(tmp_path: Path, entrypoint: str | None) -> EvaluationResult:
    (tmp_path / "evaluated_task.py").write_text(OWN)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "some words of a text, and others " * 20}) + "\n")
    model = {"hidden_size": 16, "num_hidden_layers": 2, "n_routed_experts": 4, "vocab_size": 280}
    keys = {"model": model, "train": {"sequence_length": 16, "micro_batch_size": 2, "global_batch_size": 4}}
    task = {} if entrypoint is None else {"task": {"entrypoint": entrypoint, "code_dir": str(tmp_path)}}
    job = JobSpec.model_validate({"name": "measured", **keys, **task})
    tokenizer = TextTokenizer.train(["some words of a text"], 270)
    built = build_model(job.model, 280, single_rank(job.model))
    built.init_weights(0)
    request = Evaluation("run", "checkpoint", corpus=str(tmp_path / "text.jsonl"))
    *_, result = evaluate(request, job, tokenizer, built.eval())
    assert isinstance(result, EvaluationResult)
    return result


@torch.no_grad()
def test_an_own_task_on_a_text_counts_tokens_as_the_built_in_one(tmp_path: Path) -> None:
    """In micro-batches of training: it may compare their rows."""
    built_in, own = _result(tmp_path, None), _result(tmp_path, "evaluated_task:task")
    assert (own.unit, own.rows, own.units, own.num_bytes) == ("tokens", built_in.rows, built_in.units, 660)
    assert own.loss == pytest.approx(2 * built_in.loss, rel=1e-5)
    assert own.perplexity == pytest.approx(math.exp(own.loss)) and own.bits_per_byte is not None
    assert built_in.metrics == {} and 1.0 <= own.metrics["rows"] <= 2.0
