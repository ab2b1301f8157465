"""The rule of exits: what it is fitted to, the search of its threshold, and its file."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orchestrator.checkpoint.manifest import checkpoint_name
from orchestrator.errors import DataError, NotFound, StorageError, UsageError
from orchestrator.inference.exit_rule import (
    DIRECTORY,
    RIDGE,
    ExitedTask,
    KeptRule,
    ThresholdSearch,
    fitted,
    load_rule,
    save_rule,
)
from orchestrator.model.early_exit import ExitRule
from orchestrator.model.factory import build_model, single_rank
from orchestrator.model.loss import IGNORED
from orchestrator.model.tasks.language_modeling import LanguageModeling
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.spec.exits import ExitsSpec
from orchestrator.spec.job import JobSpec
from orchestrator.storage.directory import DirectoryObjects

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
        x_NF = torch.cat((x_ND.double(), torch.ones(len(x_ND), 1)), -1)
        penalty = RIDGE * float((x_NF.T @ x_NF).diagonal()[:-1].mean())
        rows_DF = penalty**0.5 * torch.eye(D, D + 1, dtype=torch.float64)  # as many more equations: weights are 0
        solved_F = torch.linalg.lstsq(torch.cat((x_NF, rows_DF)), torch.cat((wanted, torch.zeros(D)))).solution
        torch.testing.assert_close(rule.weights_XD[index].double(), solved_F[:-1], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(estimates[:, index].double(), x_NF @ solved_F, rtol=1e-3, atol=1e-4)
        error, spread = (estimates[:, index] - wanted).square().mean(), (wanted - wanted.mean()).square().mean()
        assert error < 0.9 * spread  # a constant would leave all of it


@pytest.mark.parametrize("most", [-1.0, 0.0, 3.0, 700.5, 998.0])
def test_the_search_finds_the_highest_threshold_that_is_allowed(most: float) -> None:
    estimates = torch.arange(1000.0).view(500, 2)
    search, tried = ThresholdSearch(estimates), []
    while not search.is_over:
        tried.append(search.threshold)
        search.narrow(search.threshold <= most)
    assert tried[0] == torch.inf and len(tried) <= 9
    if most < 3:  # the smallest share that is tried is 1 / 256
        assert search.threshold == -torch.inf
    else:
        assert most - 5 < search.threshold <= most


def test_a_loss_that_is_always_allowed_lets_all_leave() -> None:
    search = ThresholdSearch(torch.arange(1000.0))
    search.narrow(True)
    assert search.is_over and search.threshold == torch.inf


def test_hidden_states_that_are_not_finite_are_refused() -> None:
    model = _model()
    with torch.no_grad():
        model.embedding.weight[3] = torch.inf
    with pytest.raises(DataError, match="aren't finite") as caught:
        fitted(model, _batches)
    assert caught.value.unchanged == "No rule was kept."


def test_without_a_threshold_the_loss_is_that_of_all_layers() -> None:
    model, (batch, *_) = _model(), _batches()
    rule, _ = fitted(model, _batches)
    with torch.no_grad():
        wanted = LanguageModeling().loss(model, batch)
    found = ExitedTask(LanguageModeling(), EXITS, rule).loss(model, batch)
    assert torch.equal(found.total, wanted.total)
    means = {name: float(each / weight) for name, (each, weight) in found.metrics.items()}
    assert means == {"layers": 3.0, "exit_1_share": 0.0, "exit_2_share": 0.0}


def _kept(threshold: float, width: int = JOB.model.hidden_size) -> KeptRule:
    rule = ExitRule(torch.randn(2, width), torch.randn(2), threshold)
    return KeptRule(rule, (1, 2), "fp32", "validation", 100, 0.01, 2.02, 2.0, 1.5)


def test_a_rule_is_kept_for_its_checkpoint_and_the_last_one_counts(tmp_path: Path) -> None:
    for threshold in (0.5, torch.inf, -torch.inf):
        kept = _kept(threshold)
        place = save_rule(tmp_path, "step-7", kept)
        found = load_rule(tmp_path, "step-7", JOB)
        assert json.loads(Path(place).read_text())["rule"]["threshold"] == str(threshold)
        assert torch.equal(found.rule.weights_XD, kept.rule.weights_XD)
        assert torch.equal(found.rule.biases_X, kept.rule.biases_X)
        assert replace(found, rule=kept.rule) == kept and found.rule.threshold == threshold
    (tmp_path / DIRECTORY / "step-7" / "0001.json").unlink()
    assert Path(save_rule(tmp_path, "step-7", _kept(0.25))).name == "0004.json"
    assert load_rule(tmp_path, "step-7", JOB).rule.threshold == 0.25


def test_a_number_that_another_process_has_taken_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, mine = _kept(0.1), _kept(0.2)
    save_rule(tmp_path, "step-7", theirs)
    names = DirectoryObjects.names
    monkeypatch.setattr(DirectoryObjects, "names", lambda *_: ())  # what was there before theirs
    place = save_rule(tmp_path, "step-7", mine)
    monkeypatch.setattr(DirectoryObjects, "names", names)
    assert Path(place).name == "0002.json" and load_rule(tmp_path, "step-7", JOB).rule.threshold == 0.2


def test_a_rule_that_is_missing_or_of_another_model_is_named(tmp_path: Path) -> None:
    name = checkpoint_name(39, 1, 0)
    with pytest.raises(NotFound, match=f"{name} of run leaving has no rule for its exits yet") as caught:
        load_rule(tmp_path, name, JOB)
    assert "eval leaving --step 39 --max-loss-increase" in caught.value.remedy
    save_rule(tmp_path, name, _kept(0.5, width=3))
    with pytest.raises(NotFound, match="or of other sizes"):
        load_rule(tmp_path, name, JOB)
    place = Path(save_rule(tmp_path, name, replace(_kept(0.5), layers=(1, 3))))
    with pytest.raises(NotFound, match=r"is of exits after layers \[1, 3\] and not \[1, 2\]"):
        load_rule(tmp_path, name, JOB)
    for content in ("{}", "[]", "no JSON", json.dumps(json.loads(place.read_text()) | {"layers": [1]})):
        place.write_text(content)
        with pytest.raises(NotFound, match="is damaged"):
            load_rule(tmp_path, name, JOB)
    with pytest.raises(UsageError, match="the model of run plain has no exits"):
        load_rule(tmp_path, name, JobSpec(name="plain"))


def test_storage_that_takes_no_rule_is_named(tmp_path: Path) -> None:
    (tmp_path / DIRECTORY).write_text("a file where the folder would be")
    with pytest.raises(StorageError, match="the rule can't be kept") as caught:
        save_rule(tmp_path, "step-7", _kept(0.5))
    assert caught.value.unchanged == "No rule was kept; those before it count."
