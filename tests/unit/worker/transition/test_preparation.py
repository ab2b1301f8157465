"""When a worker is ready to hand over, and what it does with plans that come, go or name others."""

import socket
import threading
from dataclasses import replace
from functools import cache

import pytest
import torch

from orchestrator.comm.transport.rendezvous import RendezvousServer
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.world import World
from orchestrator.model.tasks.language_modeling import LanguageModeling
from orchestrator.protocol.messages import Directive, Fence, GenerationPlan, StateSource, StoreAddress
from orchestrator.protocol.worker_job import WorkerJob
from orchestrator.protocol.worker_phase import Phase
from orchestrator.spec.job import JobSpec
from orchestrator.worker.runtime.mailbox import WorkerMailbox
from orchestrator.worker.shard.shard import ShardFactory
from orchestrator.worker.step.vote import NO_FENCE
from orchestrator.worker.transition.preparation import TransitionPreparer

JOB = JobSpec.model_validate(
    {
        "schema": "v1",
        "name": "try",
        "model": {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "n_routed_experts": 2},
    }
)


@cache
def _store() -> RendezvousServer:
    """One for all tests."""
    return RendezvousServer("127.0.0.1")


@pytest.fixture(scope="module")
def factory() -> ShardFactory:
    job = WorkerJob("try", JOB.model_dump_json(), "", "", "127.0.0.1", threads=1, vocab_size=300)
    return ShardFactory("w0", job, JOB, LanguageModeling(), torch.device("cpu"))


@pytest.fixture
def mailbox() -> WorkerMailbox:
    return WorkerMailbox("w0", 1)


def _plan(generation: int, *members: str, source: World | None = None) -> GenerationPlan:
    world = World(generation, members)
    return GenerationPlan(
        term=1,
        world=world,
        placement=ExpertPlacement.balanced(2, world.size),
        source=None
        if source is None
        else StateSource(source, ExpertPlacement.balanced(2, source.size), source.members),
        store_prefix=f"1/{generation}",
        store_address=StoreAddress(*_store().address()),
    )


def _await_prepared(mailbox: WorkerMailbox, generation: int) -> None:
    version = -1
    while (report := mailbox.report(None, version, 60.0)).transition.prepared < generation:
        assert report.version > version, f"generation {generation} was not prepared within 60 s"
        version = report.version


def _prepare(preparer: TransitionPreparer, mailbox: WorkerMailbox, generation: int) -> None:
    """Have a move of this worker alone prepared in the background."""
    mailbox.put(Directive(1, generation, next=_plan(generation, "w0", source=World(generation - 1, ("w0",)))))
    _await_prepared(mailbox, generation)


def test_a_worker_is_ready_for_a_fence_once_it_is_prepared_and_the_step_is_reached(
    factory: ShardFactory, mailbox: WorkerMailbox
) -> None:
    preparer = TransitionPreparer(factory, mailbox)
    mailbox.put(Directive(1, 0, fence=Fence(1)))
    assert preparer.fence_after(9) == NO_FENCE  # not prepared yet
    _prepare(preparer, mailbox, 1)
    assert preparer.fence_after(9) == NO_FENCE  # no fence asked for
    mailbox.put(Directive(1, 2, fence=Fence(1)))
    assert preparer.fence_after(0) == 1
    mailbox.put(Directive(1, 3, fence=Fence(1, at_step=7)))
    assert [preparer.fence_after(step) for step in (6, 7, 8)] == [NO_FENCE, 1, 1]
    mailbox.put(Directive(1, 4, fence=Fence(2)))
    assert preparer.fence_after(9) == NO_FENCE


def test_abandoned_transitions_are_closed(factory: ShardFactory, mailbox: WorkerMailbox) -> None:
    preparer = TransitionPreparer(factory, mailbox)
    for generation in (1, 2):
        _prepare(preparer, mailbox, generation)
    mailbox.put(Directive(1, 3, next=_plan(3, "w1", "w2"), fence=Fence(2)))  # behind a fence there is no way back
    assert preparer.fence_after(0) == 2
    assert preparer.take(2).plan.generation == 2
    with pytest.raises(KeyError):
        preparer.take(1)
    preparer.close()


def test_a_plan_is_begun_once_and_only_where_it_concerns_this_worker(
    factory: ShardFactory, mailbox: WorkerMailbox
) -> None:
    preparer = TransitionPreparer(factory, mailbox)
    mailbox.put(Directive(1, 0, next=_plan(1, "w1", "w2")))
    _prepare(preparer, mailbox, 2)
    version = mailbox.state.version
    mailbox.put(replace(mailbox.directive, seq=3))
    assert preparer.take(2).plan.generation == 2
    assert mailbox.state.version == version + 1  # of the directive itself
    assert not [t for t in threading.enumerate() if t.name == "prepare" and t.is_alive()]


def test_a_standby_waits_for_a_plan_that_names_it(factory: ShardFactory, mailbox: WorkerMailbox) -> None:
    preparer = TransitionPreparer(factory, mailbox)
    mailbox.put(Directive(1, 0, next=_plan(1, "w1")))
    found: list[GenerationPlan] = []
    waiter = threading.Thread(target=lambda: found.append(preparer.await_next(lambda _: False).plan), daemon=True)
    waiter.start()
    plan = _plan(2, "w0")
    mailbox.put(Directive(1, 1, next=plan))
    waiter.join(60.0)
    assert found == [plan]
    assert mailbox.state.transition.prepared == 2


def test_a_peer_that_never_connects_does_not_delay_the_next_plan(factory: ShardFactory, mailbox: WorkerMailbox) -> None:
    preparer = TransitionPreparer(factory, mailbox)
    alone = World(0, ("w0",))
    mailbox.put(Directive(1, 0, next=_plan(1, "w0", "w1", source=alone)))
    mailbox.put(Directive(1, 1, next=_plan(2, "w0", source=alone)))
    assert preparer.await_next(lambda _: False).plan.generation == 2
    preparer.close()


@pytest.mark.parametrize("without_store", [False, True], ids=["layout", "store"])
def test_a_plan_that_can_not_be_prepared_is_reported_at_once(
    factory: ShardFactory, mailbox: WorkerMailbox, without_store: bool
) -> None:
    preparer, plan = TransitionPreparer(factory, mailbox), _plan(1, "w0")
    if without_store:
        with socket.create_server(("127.0.0.1", 0)) as unused:
            plan = replace(plan, store_address=StoreAddress(*unused.getsockname()))
    else:
        plan = replace(plan, source=StateSource(World(0, ("w0",)), ExpertPlacement.balanced(2, 2), ("w0",)))
    mailbox.put(Directive(1, 0, next=plan))
    version = -1
    while (report := mailbox.report(None, version, 60.0)).transition.failed_generation < 1:
        assert report.version > version, "no report within 60 s"
        version = report.version
    assert report.phase is Phase.COLD
    preparer.close()


def test_a_plan_is_valid_while_the_newest_directive_names_it(factory: ShardFactory, mailbox: WorkerMailbox) -> None:
    preparer, plan = TransitionPreparer(factory, mailbox), _plan(5, "w0")
    mailbox.put(Directive(1, 0, next=plan))
    assert preparer.stands(plan)
    mailbox.put(Directive(1, 1, current=plan))
    assert preparer.stands(plan)
    mailbox.put(Directive(1, 2, next=replace(plan, world=World(6, ("w0",)))))
    assert not preparer.stands(plan)


@pytest.mark.parametrize("activated", [True, False])
def test_waiting_for_activation_ends_with_it_or_with_another_plan(
    factory: ShardFactory, mailbox: WorkerMailbox, activated: bool
) -> None:
    preparer, plan = TransitionPreparer(factory, mailbox), _plan(1, "w0")
    mailbox.put(Directive(1, 0, next=plan, activated=0))
    assert preparer.await_next(lambda _: False).plan == plan
    found: list[int] = []
    waiter = threading.Thread(target=lambda: found.append(preparer.await_activation(plan)), daemon=True)
    waiter.start()
    mailbox.put(
        Directive(1, 1, current=plan, activated=1) if activated else Directive(1, 1, next=_plan(2, "w0"), activated=0)
    )
    waiter.join(60.0)
    assert found == [int(activated)]


def test_a_newcomer_notices_that_the_run_continued_without_it(factory: ShardFactory, mailbox: WorkerMailbox) -> None:
    preparer, plan = TransitionPreparer(factory, mailbox), _plan(1, "w0")
    mailbox.put(Directive(1, 0, next=plan))
    assert preparer.await_next(lambda _: False).plan == plan
    mailbox.put(Directive(1, 1, current=_plan(2, "w1"), activated=2))
    assert preparer.await_activation(plan) == 2
