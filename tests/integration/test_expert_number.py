"""Another number of experts while a run trains, with real workers in real processes and without Ray."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.elastic.expert_change import ExpertChange, ExpertSet, cloned
from orchestrator.elastic.world import World
from orchestrator.policy.rescale.expert_number import with_experts
from orchestrator.spec.job import JobSpec
from orchestrator.state.fingerprint import whole
from tests.support.calm_runs import tensors_of
from tests.support.texts import OPTIMIZERS, STEPS, small_job
from tests.support.worker_group import LocalWorkerGroup, commit_of

FEW = ExpertSet(4)
GROWTH = ExpertChange(8, 4, cloned(4, 8))
SHRINK = ExpertChange(16, 8, ((0, 2, 5, 7), (1, 4, 6, 7)))
CHANGES = (GROWTH, SHRINK)
Steps = list[tuple[float, float, str]]


def _job(texts: Path, optimizer: str = "adamw", **more: Any) -> JobSpec:
    sizes = {"n_routed_experts": 4, "num_hidden_layers": 3, **more}
    return small_job(texts, sizes, determinism="exact", **OPTIMIZERS[optimizer])


class Changing:
    """A worker group whose number of experts changes at the steps of `CHANGES`."""

    def __init__(self, group: LocalWorkerGroup, job: JobSpec) -> None:
        self.group, self.layers, self.experts = group, job.model.moe_layers, FEW

    def plan_of(self, change: ExpertChange, members: list[str]) -> dict[str, Any]:
        """What the plan of the generation after a change has of it."""
        current, group = self.group.directive.current, self.group
        assert current is not None
        self.experts = self.experts.after(change)
        new = World(group.newest_generation + 1, tuple(members))
        return {
            "placement": with_experts(current.placement, change, self.layers, current.world, new, ()),
            "change": change,
            "families": self.experts.families,
            "until_step": _next(change.first_step),
        }

    def change(self, change: ExpertChange, members: list[str]) -> None:
        self.group.rescale(members, change.first_step - 1, **self.plan_of(change, members))


def _next(step: int) -> int | None:
    return next((change.first_step for change in CHANGES if change.first_step > step), None)


def _steps(group: LocalWorkerGroup) -> Steps:
    assert sorted(group.records) == list(range(STEPS))
    records = [record for _, record in sorted(group.records.items())]
    return [(r.loss, r.update.grad_norm, whole(r.state.digests)) for r in records]


def _run(job: JobSpec, store: Path, directory: Path, worlds: list[int]) -> tuple[Steps, dict[str, bytes]]:
    """The steps and the last state of a run with the changes, each of which comes with another number of workers."""
    with LocalWorkerGroup(job, store, directory, size=max(worlds)) as group:
        group.start(group.plan(group.ids[: worlds[0]], until_step=_next(0)))
        changing = Changing(group, job)
        for change, size in zip(CHANGES, worlds[1:], strict=True):
            changing.change(change, group.ids[-size:])
        group.await_finished()
        return _steps(group), tensors_of(commit_of(group, STEPS - 1))


def _plain(job: JobSpec, store: Path, directory: Path) -> Steps:
    """The steps of a run without changes."""
    with LocalWorkerGroup(job, store, directory, size=1) as group:
        group.start(group.plan(group.ids))
        group.await_finished()
        return _steps(group)


@pytest.fixture(scope="module")
def store(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.texts import prepare_texts

    return prepare_texts(texts, tmp_path_factory.mktemp("store"))


def test_experts_multiply_and_are_left_out_with_the_same_bits_in_any_world(
    texts: Path, store: Path, tmp_path: Path
) -> None:
    job = _job(texts)
    alone = _run(job, store, tmp_path / "alone", [1, 1, 1])
    spread = _run(job, store, tmp_path / "spread", [3, 2, 3])
    assert [step for step, (a, b) in enumerate(zip(alone[0], spread[0], strict=True)) if a != b] == []
    assert [name for name in alone[1] if alone[1][name] != spread[1][name]] == []
    plain = _plain(job, store, tmp_path / "plain")
    assert plain[: GROWTH.first_step] == alone[0][: GROWTH.first_step]
    assert plain[GROWTH.first_step][0] == alone[0][GROWTH.first_step][0]  # the loss, bit by bit
    assert plain[-1] != alone[0][-1]
