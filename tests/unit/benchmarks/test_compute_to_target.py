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
    spending_until,
    tuned_settings,
)
from benchmarks.support import held_out
from benchmarks.support.recipe import LENGTH, Corpus, Recipe, Setting, job_of, size_of_model
from benchmarks.support.results_file import ResultsFile
from orchestrator.policy.estimate.flops import flops_of
from orchestrator.protocol.step_record import BatchRecord, StepRecord, StepTiming, UpdateRecord
from orchestrator.spec.data import DataSpec
from orchestrator.spec.job import JobSpec

CORPUS = Corpus(DataSpec(), 2048, tokens_per_row=126.0)
FLOPS = 1e11


def _job(recipe: Recipe, setting: Setting = START) -> JobSpec:
    return job_of(recipe, setting, 0, FLOPS, CORPUS)


def _lengths(job: JobSpec) -> list[int]:
    """Tokens of a row in each step."""
    if job.curriculum is None:
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


@pytest.mark.parametrize("recipe", [DENSE, RECIPE, *WITHOUT.values()])
@pytest.mark.parametrize("rows", [8, 64])
def test_all_arms_get_the_same_operations(recipe: Recipe, rows: int) -> None:
    job = _job(recipe, replace(START, rows=rows))
    share = 1.0 if recipe.packs else CORPUS.tokens_per_row / LENGTH
    steps = [_record(i, round(rows * length * share), length) for i, length in enumerate(_lengths(job))]
    flops = flops_of(size_of_model(job, CORPUS.vocab_size), steps)
    assert flops.attention is not None
    assert flops.parameters + flops.attention == pytest.approx(FLOPS, rel=0.05)  # whole steps


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
            "growing rows": job.curriculum is None,
            "balance": job.model.bias_update_speed == 0.0,
            "compression": job.communication.compression.scheme == "none" and job.communication.tokens == "native",
            "packing": job.data.row_format == "documents",
        }
        assert [each for each, has_changed in differs.items() if has_changed] == [part]
    assert whole.model.bias_update_speed is None or whole.model.bias_update_speed > 0


def test_rows_grow_after_three_tenths_of_the_tokens() -> None:
    job = job_of(RECIPE, START, 0, 1e12, CORPUS)
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


class _Repeats:
    """A model for which a token that was there before in its row costs nothing, and each other token 1 nat."""

    def token_losses(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        losses = torch.ones(targets_BT.shape)
        for row, (inputs, targets) in enumerate(zip(inputs_BT.tolist(), targets_BT.tolist(), strict=True)):
            for t, target in enumerate(targets):
                if target in inputs[: t + 1]:
                    losses[row, t] = 0.0
        return losses


def test_copies_and_continuations_tell_a_model_that_reads_its_row() -> None:
    model: Any = _Repeats()
    distinct_IT = torch.arange(4 * held_out.COPIED).view(4, -1)
    assert held_out._copy(model, distinct_IT) == 0.0
    prompts_IP = torch.arange(8 * held_out.PROMPT).view(8, -1)
    own = torch.cat((prompts_IP, prompts_IP[:, : held_out.CONTINUATION]), 1)
    assert held_out._choice(model, own) == 1.0
    others = torch.cat((prompts_IP, prompts_IP.roll(-1, 0)[:, : held_out.CONTINUATION]), 1)
    assert held_out._choice(model, others) == 0.0  # the continuation of the next item but one place is its own


def test_a_model_that_reads_nothing_copies_no_better() -> None:
    class Even:
        def token_losses(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
            return torch.full(targets_BT.shape, 2.0)

    model: Any = Even()
    rows_IT = torch.arange(4 * held_out.COPIED).view(4, -1)
    assert held_out._copy(model, rows_IT) == pytest.approx(1.0)
