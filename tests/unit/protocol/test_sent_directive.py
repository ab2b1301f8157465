"""Plans by digest: what is sent, and what a worker makes of it."""

import pickle
from dataclasses import replace

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.world import World
from orchestrator.protocol.codec import from_plain, to_plain
from orchestrator.protocol.messages import Directive, GenerationPlan, StoreAddress
from orchestrator.protocol.replay_task import ReplayTask
from orchestrator.protocol.sent_directive import SentDirective


def _plan(generation: int, size: int = 3) -> GenerationPlan:
    world = World(generation, tuple(f"w{rank}" for rank in range(size)))
    placement = ExpertPlacement.balanced(4, size)
    return GenerationPlan(1, world, placement, None, f"1/{generation}", StoreAddress("head", 1))


OLD, NEW = _plan(3), _plan(4)
DIRECTIVE = Directive(1, 7, current=OLD, next=NEW, activated=3)


def test_a_worker_that_knows_no_plan_gets_them_all() -> None:
    sent = SentDirective.of(DIRECTIVE, "w0", known=())
    assert sent.plans == (OLD, NEW)
    assert pickle.loads(pickle.dumps(sent)).whole(known=()) == DIRECTIVE


def test_a_known_plan_is_sent_by_its_digest() -> None:
    sent = SentDirective.of(DIRECTIVE, "w0", known=[OLD.digest])
    assert sent.plans == (NEW,)
    assert sent.whole(known=(OLD,)) == DIRECTIVE
    assert SentDirective.of(replace(DIRECTIVE, next=None), "w0", ()).whole(known=()) == replace(DIRECTIVE, next=None)


def test_a_directive_with_an_unknown_plan_is_not_acted_on() -> None:
    sent = SentDirective.of(DIRECTIVE, "w0", known=[OLD.digest, NEW.digest])
    assert sent.whole(known=(OLD,)) is None
    assert sent.whole(known=(NEW, OLD)) == DIRECTIVE


def test_a_known_plan_takes_no_room_however_large_its_world() -> None:
    sizes = []
    for plan in (_plan(3), _plan(3, size=1000)):
        directive = Directive(1, 7, current=plan)
        sizes.append(len(pickle.dumps(SentDirective.of(directive, "w0", known=[plan.digest]))))
        assert len(pickle.dumps(SentDirective.of(directive, "w0", known=()))) > 2 * sizes[-1]
    assert sizes[0] == sizes[1] < 1000


def test_a_digest_is_that_of_the_content_in_every_process() -> None:
    again = from_plain(GenerationPlan, to_plain(OLD))
    assert again is not OLD and again.digest == OLD.digest == pickle.loads(pickle.dumps(OLD)).digest
    others = [NEW, replace(OLD, skips=(4,)), replace(OLD, nodes=("a", "a", "b")), replace(OLD, term=2)]
    assert len({OLD.digest, *(plan.digest for plan in others)}) == 1 + len(others)


def test_only_the_worker_that_replays_steps_gets_the_task() -> None:
    directive = Directive(1, 7, check=ReplayTask(0, "w1", 9, "checkpoints/step-9", 19, worlds=()))
    assert SentDirective.of(directive, "w1", ()).whole(()) == directive
    assert SentDirective.of(directive, "w0", ()).whole(()) == Directive(1, 7)
