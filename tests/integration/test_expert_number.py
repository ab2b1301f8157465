"""Another number of experts while a run trains, with real workers in real processes and without Ray."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.elastic.expert_change import ExpertChange, ExpertSet, cloned
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.world import World
from orchestrator.policy.rescale.expert_number import with_experts
from orchestrator.protocol.messages import Restore
from orchestrator.spec.fault_tolerance import CheckpointSpec
from orchestrator.spec.job import JobSpec
from orchestrator.spec.moe.experts import ExpertsSpec
from orchestrator.state.fingerprint import whole
from tests.support.calm_runs import tensors_of
from tests.support.texts import OPTIMIZERS, STEPS, small_job
from tests.support.worker_group import LocalWorkerGroup, commit_of

pytestmark = pytest.mark.usefixtures("device")

FEW = ExpertSet(4)
GROWTH = ExpertChange(8, 4, cloned(4, 8))
SHRINK = ExpertChange(16, 8, ((0, 2, 5, 7), (1, 4, 6, 7)))
CHANGES = (GROWTH, SHRINK)
Steps = list[tuple[float, float, str]]


def _job(texts: Path, optimizer: str = "adamw", **more: Any) -> JobSpec:
    sizes = {"n_routed_experts": 4, "num_hidden_layers": 3, **more}
    job = small_job(texts, sizes, determinism="exact", **OPTIMIZERS[optimizer])
    return job.model_copy(update={"experts": ExpertsSpec(saliency=True)})


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

    def first_plan(self, step: int) -> dict[str, Any]:
        """What the plan of a generation that begins with this step, from a checkpoint, has of the experts."""
        change = next((change for change in CHANGES if change.first_step == step), None)
        self.experts = self.experts if change is None else self.experts.after(change)
        return {
            "placement": ExpertPlacement.balanced(self.experts.num_experts, len(self.group.ids)),
            "change": change,
            "families": self.experts.families,
            "until_step": _next(step),
        }

    def change(self, change: ExpertChange, members: list[str]) -> None:
        self.group.rescale(members, change.first_step - 1, **self.plan_of(change, members))


def _next(step: int) -> int | None:
    return next((change.first_step for change in CHANGES if change.first_step > step), None)


def _steps(group: LocalWorkerGroup) -> Steps:
    assert sorted(group.records) == list(range(STEPS))
    records = [record for _, record in sorted(group.records.items())]
    return [(r.loss, r.update.grad_norm, whole(r.state.digests)) for r in records]


def _run(
    job: JobSpec, store: Path, directory: Path, worlds: list[int], changes: Sequence[ExpertChange] = CHANGES
) -> tuple[Steps, dict[str, bytes]]:
    """The steps and the last state of a run with the changes, each of which comes with another number of workers."""
    with LocalWorkerGroup(job, store, directory, size=max(worlds)) as group:
        group.start(group.plan(group.ids[: worlds[0]], until_step=_next(0)))
        changing = Changing(group, job)
        for change, size in zip(changes, worlds[1:], strict=True):
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
def calm(texts: Path, store_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Steps, dict[str, bytes]]:
    """The run with the changes by one worker, to which nothing else happens."""
    return _run(_job(texts), store_dir, tmp_path_factory.mktemp("calm"), [1, 1, 1])


def _assert_same(one: tuple[Steps, dict[str, bytes]], other: tuple[Steps, dict[str, bytes]]) -> None:
    assert [step for step, (a, b) in enumerate(zip(one[0], other[0], strict=True)) if a != b] == []
    assert one[1].keys() == other[1].keys()
    assert [name for name in one[1] if one[1][name] != other[1][name]] == []


@pytest.mark.long_emulated
def test_experts_multiply_and_are_left_out_with_the_same_bits_in_any_world(
    texts: Path, store_dir: Path, tmp_path: Path, calm: tuple[Steps, dict[str, bytes]]
) -> None:
    job = _job(texts)
    _assert_same(calm, _run(job, store_dir, tmp_path / "spread", [3, 2, 3]))
    plain = _plain(job, store_dir, tmp_path / "plain")
    assert plain[: GROWTH.first_step] == calm[0][: GROWTH.first_step]
    assert plain[GROWTH.first_step][0] == calm[0][GROWTH.first_step][0]  # the loss, bit by bit
    assert plain[-1] != calm[0][-1]


@pytest.mark.long_emulated
@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "adamw"])
def test_state_of_every_optimizer_follows_its_experts(
    texts: Path, store_dir: Path, tmp_path: Path, optimizer: str
) -> None:
    job = _job(texts, optimizer, router={"scorer": "context", "rank": 4, "num_heads": 2})
    alone = _run(job, store_dir, tmp_path / "alone", [1, 1, 1])
    _assert_same(alone, _run(job, store_dir, tmp_path / "spread", [2, 3, 2]))


@pytest.mark.long_emulated
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_clones_are_changed_alike_in_any_world(texts: Path, store_dir: Path, tmp_path: Path, precision: str) -> None:
    job = _job(texts)
    job = job.model_copy(update={"train": job.train.model_copy(update={"precision": precision})})
    with_noise = replace(GROWTH, noise=0.3, reinit_ratio=0.5)
    alone, spread = (
        _run(job, store_dir, tmp_path / str(worlds), worlds, (with_noise, SHRINK)) for worlds in ([1, 1, 1], [2, 3, 2])
    )
    _assert_same(alone, spread)
    assert alone[0][GROWTH.first_step] != _plain(job, store_dir, tmp_path / "plain")[GROWTH.first_step]


def test_a_run_whose_workers_die_at_its_changes_does_them_again_at_the_same_steps(
    texts: Path, store_dir: Path, tmp_path: Path, calm: tuple[Steps, dict[str, bytes]]
) -> None:
    with LocalWorkerGroup(_job(texts), store_dir, tmp_path, size=4) as group:
        group.start(group.plan(group.ids[:3], until_step=_next(0)))
        changing = Changing(group, _job(texts))
        group.await_step(GROWTH.first_step - 3)
        group.members["w1"].kill()
        newest = group.newest_step
        plan = group.recover(["w0", "w2"], until_step=_next(0))  # before the growth
        assert newest - 3 <= plan.source.step < GROWTH.first_step - 1
        changing.change(GROWTH, ["w0", "w2", "w3"])
        group.await_step(GROWTH.first_step + 2)
        group.members["w2"].kill()
        group.recover(["w0", "w3"], families=changing.experts.families, until_step=SHRINK.first_step)
        changing.change(SHRINK, ["w0", "w3"])
        group.await_finished()
        _assert_same(calm, (_steps(group), tensors_of(commit_of(group, STEPS - 1))))


@pytest.mark.long_emulated
@pytest.mark.parametrize("last_step", [GROWTH.first_step - 1, GROWTH.first_step, SHRINK.first_step - 1])
def test_a_checkpoint_before_and_after_a_change_continues_in_another_world(
    texts: Path, store_dir: Path, tmp_path: Path, calm: tuple[Steps, dict[str, bytes]], last_step: int
) -> None:
    job = _job(texts).model_copy(update={"checkpoint": CheckpointSpec(every=last_step + 1)})
    with LocalWorkerGroup(job, store_dir, tmp_path / "first", size=2) as group:
        group.start(group.plan(group.ids, until_step=_next(0)))
        changing = Changing(group, job)
        if last_step >= GROWTH.first_step:
            changing.change(GROWTH, group.ids)
        group.await_step(last_step)
        group.await_all(group.ids, lambda r: any(s.step == last_step for s in r.shards))
        group.final = {worker: group.members[worker].report() for worker in group.ids}
        checkpoint = commit_of(group, last_step)
    with LocalWorkerGroup(job, store_dir, tmp_path / "second", size=3) as group:
        changing = Changing(group, job)
        changing.experts = FEW if last_step < GROWTH.first_step else FEW.after(GROWTH)
        more = changing.first_plan(last_step + 1)
        group.start(group.plan(group.ids, restore=Restore(last_step, str(checkpoint)), **more))
        if last_step + 1 < SHRINK.first_step:
            changing.change(SHRINK, group.ids[:2])
        group.await_finished()
        records = [record for _, record in sorted(group.records.items())]
        found = [(r.loss, r.update.grad_norm, whole(r.state.digests)) for r in records]
        assert found == calm[0][last_step + 1 :]
        ours = tensors_of(commit_of(group, STEPS - 1))
        assert [name for name in ours if ours[name] != calm[1][name]] == []
