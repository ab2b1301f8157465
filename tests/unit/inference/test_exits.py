"""The rule of exits: what it is fitted to, the search of its threshold, and its file."""

from pathlib import Path

import pytest
import torch

from orchestrator.errors import NotFound, UsageError
from orchestrator.inference.exits import DIRECTORY, ExitedTask, ThresholdSearch, fitted, load_rule, save_rule
from orchestrator.model.early_exit import ExitRule
from orchestrator.model.factory import build_model, single_rank
from orchestrator.model.loss import IGNORED
from orchestrator.model.tasks.language_modeling import LanguageModeling
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.spec.exits import ExitsSpec
from orchestrator.spec.job import JobSpec

V, D = 40, 16
EXITS = ExitsSpec(layers=(1, 2))
SIZES = {"hidden_size": D, "num_hidden_layers": 3, "initializer_range": 0.2, "n_routed_experts": 4}
JOB = JobSpec.model_validate({"name": "leaving", "model": {**SIZES, "exits": {"layers": [1, 2]}}})


def _model() -> MoELanguageModel:
    model = build_model(JOB.model, V, single_rank(JOB.model))
    assert isinstance(model, MoELanguageModel)
    model.init_weights(0)
    return model.eval()


def _batches(rows: int = 32) -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(0, V, (rows, 33), generator=torch.Generator().manual_seed(1))
    targets = tokens[:, 1:].clone()
    targets[:, 5] = IGNORED
    return [{"inputs": tokens[i : i + 8, :-1], "targets": targets[i : i + 8]} for i in range(0, rows, 8)]


@torch.no_grad()
def test_estimates_are_the_least_squares_of_the_roots_of_divergences() -> None:
    model = _model()
    rule, estimates = fitted(model, _batches)
    assert rule.threshold == -torch.inf
    scores = [model.scores(batch["inputs"]) for batch in _batches()]
    counts = torch.cat([batch["targets"].flatten() != IGNORED for batch in _batches()])
    last = torch.cat([(each.x_ND @ model.head.T).log_softmax(-1) for each in scores])[counts].double()
    for index in range(2):
        x_ND = torch.cat([each.exits[index] for each in scores])[counts]
        exit_NV = (x_ND @ model.head.T).log_softmax(-1).double()
        wanted = torch.nn.functional.kl_div(exit_NV, last, log_target=True, reduction="none").sum(-1).sqrt()
        torch.testing.assert_close(estimates[:, index], rule.estimates(x_ND, index))
        error, spread = (estimates[:, index] - wanted).square().mean(), (wanted - wanted.mean()).square().mean()
        assert error < 0.9 * spread  # a constant would leave all of it
        assert abs(float((estimates[:, index] - wanted).mean())) < 1e-3  # the constant isn't penalized


def test_the_search_finds_the_highest_threshold_that_is_allowed() -> None:
    estimates = torch.arange(1000.0).view(500, 2)
    for most in (-1.0, 0.0, 3.0, 700.5, 998.0):
        search = ThresholdSearch(estimates)
        tried = []
        while not search.is_over:
            tried.append(search.threshold)
            search.narrow(search.threshold <= most)
        assert tried[0] == torch.inf and len(tried) <= 9
        assert search.threshold <= most and (search.threshold >= most - 5 or most < 5)
    search = ThresholdSearch(estimates)
    search.narrow(True)
    assert search.is_over and search.threshold == torch.inf


def test_without_a_threshold_the_loss_is_that_of_all_layers() -> None:
    model, (batch, *_) = _model(), _batches()
    rule, _ = fitted(model, _batches)
    with torch.no_grad():
        wanted = LanguageModeling().loss(model, batch)
    found = ExitedTask(LanguageModeling(), EXITS, rule).loss(model, batch)
    assert torch.equal(found.total, wanted.total)
    means = {name: float(each / weight) for name, (each, weight) in found.metrics.items()}
    assert means == {"layers": 3.0, "exit_1_share": 0.0, "exit_2_share": 0.0}


def test_a_rule_is_kept_for_its_checkpoint_and_the_last_one_counts(tmp_path: Path) -> None:
    rules = [ExitRule(torch.randn(2, D), torch.randn(2), threshold) for threshold in (0.5, torch.inf)]
    for rule in rules:
        place = save_rule(tmp_path, "step-7", rule)
        found = load_rule(tmp_path, "step-7", JOB)
        assert Path(place).is_file() and found.threshold == rule.threshold
        assert torch.equal(found.weights_XD, rule.weights_XD) and torch.equal(found.biases_X, rule.biases_X)
    with pytest.raises(NotFound, match="step-8 of run leaving has no rule for its exits yet") as caught:
        load_rule(tmp_path, "step-8", JOB)
    assert "--max-loss-increase" in caught.value.remedy
    (tmp_path / DIRECTORY / "step-7" / "0003.json").write_text("{}")
    with pytest.raises(NotFound, match="0003.json of exits can't be read"):
        load_rule(tmp_path, "step-7", JOB)
    with pytest.raises(UsageError, match="the model of run plain has no exits"):
        load_rule(tmp_path, "step-7", JobSpec(name="plain"))
