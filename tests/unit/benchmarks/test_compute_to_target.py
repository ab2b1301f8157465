"""The decisions of `benchmarks.compute_to_target`: what is tried, what a loss took, and how the arms differ."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.compute_to_target import (
    DENSE,
    LADDERS,
    RECIPE,
    START,
    WITHOUT,
    Spending,
    _result,
    spending_until,
    training_s,
    tuned_settings,
)
from benchmarks.harness import Result
from benchmarks.support import held_out
from benchmarks.support.recipe import LENGTH, Corpus, Recipe, Setting, job_of, size_of_model
from benchmarks.support.results_file import ResultsFile
from orchestrator.data.prepare.job_store import prepare
from orchestrator.data.store import IGNORED_TARGET
from orchestrator.policy.estimate.flops import flops_of
from orchestrator.protocol.step_record import BatchRecord, StepRecord, StepTiming, UpdateRecord
from orchestrator.spec.data import DataSpec
from orchestrator.spec.job import JobSpec

CORPUS = Corpus(DataSpec(), 2048, tokens_per_row=126.0)
FLOPS = 1e12
ARMS = {"dense": DENSE, "recipe": RECIPE, **{f"without {part}": recipe for part, recipe in WITHOUT.items()}}


def _job(recipe: Recipe, setting: Setting = START) -> JobSpec:
    return job_of(recipe, setting, 0, FLOPS, CORPUS)


def _lengths(job: JobSpec) -> list[int]:
    """Tokens of a row in each step."""
    if job.curriculum is None or len(job.curriculum.stages) == 1:
        return [LENGTH] * job.train.max_steps
    short, _ = job.curriculum.stages
    assert short.until is not None and short.until.steps is not None and short.sequence_length is not None
    num_short = short.until.steps
    return [short.sequence_length] * num_short + [LENGTH] * (job.train.max_steps - num_short)


def _record(step: int, tokens: int, length: int) -> StepRecord:
    return StepRecord(
        step, 0, 2, 1.0, BatchRecord(tokens, 0, 0, sequence_length=length), UpdateRecord(0.0, 0.0, True), _timing()
    )


def _timing() -> StepTiming:
    return StepTiming(0.0, 0.0)


@pytest.mark.parametrize("recipe", ARMS.values(), ids=ARMS)
@pytest.mark.parametrize("rows", [8, 64])
def test_all_arms_get_the_same_operations(recipe: Recipe, rows: int) -> None:
    job = _job(recipe, replace(START, rows=rows))
    share = 1.0 if recipe.packs else CORPUS.tokens_per_row / LENGTH
    steps = [_record(i, round(rows * length * share), length) for i, length in enumerate(_lengths(job))]
    flops = flops_of(size_of_model(job, CORPUS.vocab_size), steps)
    assert flops.attention is not None
    assert flops.parameters + flops.attention == pytest.approx(FLOPS, rel=0.02)  # whole steps


@pytest.mark.parametrize("width", LADDERS["width"])
def test_a_token_is_multiplied_by_as_many_weights_on_both_sides(width: int) -> None:
    setting = replace(START, width=width)
    dense, recipe = (size_of_model(_job(each, setting), CORPUS.vocab_size) for each in (DENSE, RECIPE))
    routers = 3 * 16 * width
    assert recipe.active_parameters == dense.active_parameters + routers
    assert recipe.parameters > 1.8 * dense.parameters  # most are embeddings at the smallest width
    assert recipe.attention == dense.attention


def test_each_arm_lacks_one_part() -> None:
    whole = _job(RECIPE)
    for part, recipe in WITHOUT.items():
        job = _job(recipe)
        differs = {
            "experts": bool(job.model.moe_layers) != bool(whole.model.moe_layers),
            "growing rows": job.curriculum is None or len(job.curriculum.stages) == 1,
            "curriculum": job.curriculum is None,
            "balance": job.model.bias_update_speed == 0.0,
            "compression": job.communication.compression.scheme == "none" and job.communication.tokens == "native",
            "packing": job.data.row_format == "documents",
        }
        expected = ["growing rows", part] if part == "curriculum" else [part]
        assert [each for each, has_changed in differs.items() if has_changed] == expected


def test_rows_grow_after_three_tenths_of_the_tokens() -> None:
    job = _job(RECIPE)
    lengths = _lengths(job)
    assert lengths == sorted(lengths) and set(lengths) == {64, 128}
    short = sum(length for length in lengths if length == 64)
    assert short / sum(lengths) == pytest.approx(0.3, abs=0.01)


def test_tuning_ends_where_no_neighbour_is_better() -> None:
    def loss_of(setting: Setting) -> float:
        wanted = {"rows": 64, "lr": 4e-3, "width": 64}
        return sum(
            abs(ladder.index(getattr(setting, key)) - ladder.index(wanted[key])) for key, ladder in LADDERS.items()
        )

    tried = tuned_settings(START, LADDERS, loss_of)
    best = min(tried, key=lambda setting: tried[setting])
    assert best == Setting(rows=64, lr=4e-3, width=64)
    for key, ladder in LADDERS.items():
        place = ladder.index(getattr(best, key))
        for value in ladder[max(0, place - 1) : place + 2]:
            assert replace(best, **{key: value}) in tried
    assert len(tried) < math.prod(len(ladder) for ladder in LADDERS.values())


def test_tuning_asks_for_each_setting_once() -> None:
    asked: list[Setting] = []

    def loss_of(setting: Setting) -> float:
        asked.append(setting)
        return float(setting.width)

    tuned_settings(START, LADDERS, loss_of)
    assert len(asked) == len(set(asked))


RUNS: list[dict[str, Any]] = [{"loss": 4.0, "flops": 1.0}, {"loss": 2.0, "flops": 4.0}, {"loss": 1.0, "flops": 16.0}]


@pytest.mark.parametrize(
    ("loss", "spent", "bound"),
    [
        (4.0, 1.0, "most"),
        (5.0, 1.0, "most"),
        (2.0, 4.0, "exact"),
        (2.0 * math.sqrt(2.0), 2.0, "exact"),
        (math.sqrt(2.0), 8.0, "exact"),
        (1.0, 16.0, "exact"),
        (0.9, 16.0, "least"),
    ],
)
def test_a_loss_is_reached_on_a_line_of_logarithms(loss: float, spent: float, bound: str) -> None:
    found = spending_until(loss, RUNS, "flops")
    assert found.spent == pytest.approx(spent) and found.bound == bound


def test_a_loss_that_rises_again_counts_where_it_was_reached() -> None:
    runs = [*RUNS[:2], {"loss": 3.0, "flops": 16.0}]
    assert spending_until(2.0, runs, "flops") == Spending(pytest.approx(4.0), "exact")  # type: ignore[arg-type]


def test_results_are_measured_once_and_kept(tmp_path: Path) -> None:
    path, measured = tmp_path / "results.jsonl", []

    def measure() -> dict[str, float]:
        measured.append(1)
        return {"loss": 1.5}

    assert ResultsFile(path).of({"seed": 0, "lr": 0.1}, measure) == {"loss": 1.5}
    assert ResultsFile(path).of({"lr": 0.1, "seed": 0}, measure) == {"loss": 1.5}  # in another process
    assert len(measured) == 1
    ResultsFile(path).of({"seed": 1, "lr": 0.1}, measure)
    assert len(measured) == 2
    (first, _) = map(json.loads, path.read_text().splitlines())
    assert first["settings"] == {"seed": 0, "lr": 0.1} and set(first) >= {"commit", "dirty", "cpu", "measured"}


def test_a_loss_that_is_no_number_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "results.jsonl"
    assert ResultsFile(path).of({}, lambda: {"loss": math.nan, "copy": 0.5}) == {"loss": None, "copy": 0.5}
    assert ResultsFile(path).of({}, lambda: pytest.fail("it was kept")) == {"loss": None, "copy": 0.5}


def test_figures_of_another_processor_are_not_used(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    ResultsFile(path).of({}, lambda: {"loss": 1.0})
    path.write_text(json.dumps({**json.loads(path.read_text()), "cpu": "another"}) + "\n")
    assert ResultsFile(path).of({}, lambda: {"loss": 2.0}) == {"loss": 2.0}


def test_a_step_that_was_disturbed_counts_as_others_of_its_length() -> None:
    timings = [(64, 1.0), (64, 1.0), (64, 9.0), (128, 2.0), (128, 2.0)]
    records = [
        replace(_record(step, 1, length), timing=StepTiming(step_s, 0.0))
        for step, (length, step_s) in enumerate(timings)
    ]
    assert training_s(records) == 3 * 1.0 + 2 * 2.0


def _run(loss: float, flops: float, worker_s: float) -> dict[str, Any]:
    spent = {"flops": flops, "worker_s": worker_s, "tokens": flops, "bytes_sent": 0}
    return {"loss": loss, **spent, "choice": 0.5}


def _judged(recipe_losses: tuple[float, float, float], worker_s_of_recipe: float = 1.0) -> Result:
    """Three seeds of a dense model that has a loss of 4, 3 and 2 after 1, 2 and 4, and of a recipe."""
    dense = [_run(loss, spent, spent) for loss, spent in ((4.0, 1.0), (3.0, 2.0), (2.0, 4.0))]
    recipe = [
        _run(loss, spent, worker_s_of_recipe * spent)
        for loss, spent in zip(recipe_losses, (1.0, 2.0, 4.0), strict=True)
    ]
    parts = {"experts": [_run(3.0, 2.0, 2.0)] * 3}
    return _result(False, {}, {"dense": [dense] * 3, "recipe": [recipe] * 3}, parts, {})


def test_a_recipe_that_needs_a_quarter_meets_both_bars() -> None:
    judged = _judged((2.06, 1.5, 1.0))
    ratio = judged.metrics["ratios"]["flops"]["recipe"]
    assert ratio["ratio"].median == pytest.approx(4.0) and ratio["spending"] == ["most"] * 3  # 3 % more than 2 are 2.06
    assert [bar.met for bar in judged.bars] == [True, True]


def test_a_recipe_with_slow_steps_meets_the_bar_of_operations_alone() -> None:
    judged = _judged((2.06, 1.5, 1.0), worker_s_of_recipe=3.0)
    assert judged.metrics["ratios"]["worker_s"]["recipe"]["ratio"].median == pytest.approx(4.0 / 3.0)
    assert {bar.name: bar.met for bar in judged.bars} == {"flops_ratio": True, "time_ratio": False}


def test_a_loss_that_is_not_reached_meets_no_bar() -> None:
    judged = _judged((6.0, 5.0, 4.0), worker_s_of_recipe=0.1)  # ten times as fast, to another loss
    ratio = judged.metrics["ratios"]["worker_s"]["recipe"]
    assert ratio["ratio"].median == pytest.approx(10.0) and ratio["spending"] == ["least"] * 3
    assert [bar.met for bar in judged.bars] == [False, False]


def test_a_part_is_judged_by_what_the_whole_recipe_took_for_its_loss() -> None:
    judged = _judged((6.0, 4.0, 3.0))
    without = judged.metrics["parts"]["without experts"]
    assert without["flops"]["ratio"].median == pytest.approx(0.5)  # 2, where the whole recipe took 4
    assert judged.metrics["behind the recipe"]["without experts"].median == pytest.approx(3.0 / 4.0 - 1.0)
    assert judged.metrics["behind dense"]["1"].median == pytest.approx(0.5)


# -- held-out figures ------------------------------------------------------------------------------------------------


class _Repeats:
    """A model for which a token that was there before in its row costs nothing, and each other token 1 nat."""

    def token_losses(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        losses = torch.ones(targets_BT.shape)
        for row, (inputs, targets) in enumerate(zip(inputs_BT.tolist(), targets_BT.tolist(), strict=True)):
            for t, target in enumerate(targets):
                if target in inputs[: t + 1] or target == IGNORED_TARGET:
                    losses[row, t] = 0.0
        return losses


class _Even:
    """A model for which each target costs 2 nats."""

    def token_losses(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return torch.where(targets_BT == IGNORED_TARGET, 0.0, 2.0)


def test_a_model_that_finds_earlier_tokens_gains_from_a_copy() -> None:
    rows_IT = torch.arange(4 * held_out.COPIED).view(4, -1)
    model: Any = _Repeats()
    assert held_out._copy(model, rows_IT) == pytest.approx(1.0)
    model = _Even()
    assert held_out._copy(model, rows_IT) == 0.0


def test_own_continuations_are_told_from_others() -> None:
    prompts_IP = torch.arange(8 * held_out.PROMPT).view(8, -1)
    own_IT = torch.cat((prompts_IP, prompts_IP[:, : held_out.CONTINUATION]), 1)
    model: Any = _Repeats()
    assert held_out._choice(model, own_IT) == 1.0
    of_others_IT = torch.cat((prompts_IP, prompts_IP.roll(2, 0)[:, : held_out.CONTINUATION]), 1)
    assert held_out._choice(model, of_others_IT) == 0.0  # the continuation that fits is another item's
    model = _Even()
    assert held_out._choice(model, own_IT) == 0.0  # no preference


def test_first_tokens_of_documents_are_no_targets(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(40):
        (texts / f"{number}.txt").write_text(f"text {number} has {number * number} words, " * 40)
    store = prepare(str(texts), 300, 0.5, tmp_path / "stores")
    _, targets_IT = held_out._drawn(store, 16, 10**6)
    assert (targets_IT == IGNORED_TARGET).any()
    model: Any = _Even()
    assert held_out.held_out(model, store, 16, 10**6)["loss"] == pytest.approx(2.0)
