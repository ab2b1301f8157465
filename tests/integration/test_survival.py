"""Real workers in real processes that are killed and stopped: training goes on from the newest state that was held."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.protocol.messages import Phase
from orchestrator.sampling.sample_ledger import audit
from tests.support.crew import Crew
from tests.support.texts import STEPS, small_job

SOON_S = 10.0


@pytest.fixture
def crew(texts: Path, store_dir: Path, tmp_path: Path) -> Iterator[Crew]:
    with Crew(small_job(texts, determinism="exact"), store_dir, tmp_path, size=4) as crew:
        yield crew


def _same_training(crew: Crew, undisturbed: Crew) -> None:
    """Every step once, the same samples in the same order, the same bits of losses and norms."""
    assert sorted(crew.records) == list(range(STEPS))
    order = [(r.step, r.first_position, r.num_positions) for _, r in sorted(crew.records.items())]
    assert audit(order).ok
    for step, record in crew.records.items():
        assert (record.loss, record.grad_norm) == (undisturbed.records[step].loss, undisturbed.records[step].grad_norm)


def _handovers(crew: Crew, generation: int) -> list[Any]:
    reports = [crew.members[w].report() for w in crew.ids if crew.members[w].process.is_alive()]
    return [h for r in reports for h in r.handovers if h.generation == generation]


@pytest.mark.parametrize("victims", [(2,), (0,), (1, 3)], ids=["one", "the first", "two that are no buddies"])
def test_killed_members_cost_no_committed_step(crew: Crew, undisturbed: Crew, victims: tuple[int, ...]) -> None:
    crew.start(crew.plan(crew.ids))
    crew.await_step(5)
    for victim in victims:
        crew.members[crew.ids[victim]].kill()
    survivors = [worker for i, worker in enumerate(crew.ids) if i not in victims]
    crew.await_all(survivors, lambda r: r.phase is Phase.STRANDED, SOON_S)
    committed = max(crew.members[w].report().committed for w in survivors)
    plan = crew.recover(survivors)
    assert plan.source is not None and plan.source.step is not None
    newest = max([committed, *(h.step for h in _handovers(crew, plan.generation))])
    assert committed <= plan.source.step == newest
    assert all(h.state_identical for h in _handovers(crew, plan.generation))
    crew.await_finished()
    _same_training(crew, undisturbed)


def test_a_stopped_member_is_left_behind(crew: Crew, undisturbed: Crew) -> None:
    """It answers nothing and closes nothing: the others shut their own connections when they are told."""
    crew.start(crew.plan(crew.ids))
    crew.await_step(5)
    stopped = crew.members[crew.ids[2]]
    os.kill(stopped.process.pid or 0, signal.SIGSTOP)
    survivors = [crew.ids[0], crew.ids[1], crew.ids[3]]
    crew.send(to=survivors, aborted=0)
    crew.await_all(survivors, lambda r: r.phase is Phase.STRANDED, SOON_S)
    stopped.kill()
    plan = crew.recover(survivors)
    assert all(h.state_identical for h in _handovers(crew, plan.generation))
    crew.await_finished()
    _same_training(crew, undisturbed)


@pytest.mark.parametrize("protection", [pytest.param("every 4", marks=pytest.mark.slow), "auto"])
def test_a_loss_between_two_snapshots_goes_back_to_the_older_one(
    texts: Path, store_dir: Path, tmp_path: Path, undisturbed: Crew, protection: str
) -> None:
    job = small_job(texts, determinism="exact").model_copy(update={"protection": protection})
    with Crew(job, store_dir, tmp_path, size=3) as crew:
        crew.start(crew.plan(crew.ids))
        crew.await_step(12)
        interval = crew.records[12].snapshot_interval
        crew.members[crew.ids[1]].kill()
        survivors = [crew.ids[0], crew.ids[2]]
        crew.await_all(survivors, lambda r: r.phase is Phase.STRANDED, SOON_S)
        stopped = max(crew.members[w].report().step for w in survivors)
        committed = max(crew.members[w].report().committed for w in survivors)
        plan = crew.recover(survivors)
        assert plan.source is not None and plan.source.step is not None
        assert committed <= plan.source.step <= stopped
        if protection == "every 4":
            assert interval == 4 and (committed + 1) % 4 == 0
            assert (plan.source.step + 1) % 4 == 0 or plan.source.step == stopped
        else:
            assert 1 <= interval <= 64
        crew.await_finished()
    _same_training(crew, undisturbed)
