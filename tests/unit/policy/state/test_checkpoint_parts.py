"""Which checkpoints can still be completed."""

from dataclasses import replace

from orchestrator.policy.state.checkpoint_parts import can_complete, complete_checkpoints
from orchestrator.protocol.worker_report import ShardWritten
from tests.unit.policy.imagined import Life, limits_of


def _life() -> Life:
    """Two members in training, with a checkpoint of step 3."""
    life = Life(limits_of(steps=40), checkpoint_every=4)
    life.run_until(lambda: life.state.checkpoint_done == 3)
    return life


def _can_complete(life: Life, step: int, term: int = 1, generation: int = 0) -> bool:
    return can_complete(life.state, life.seen(), step, term, generation)


def _wrote(life: Life, rank: int, step: int) -> None:
    worker = life.state.members[rank]
    shard = ShardWritten(step, 0, rank, f"rank-{rank}", 0, "", "")
    life.say(worker, shards=(*life.reports[worker].shards, shard))


def test_parts_wait_for_ranks_that_still_write() -> None:
    life = _life()
    assert _can_complete(life, 9)
    _wrote(life, 0, 9)
    assert _can_complete(life, 9)
    _wrote(life, 1, 9)
    assert _can_complete(life, 9)  # its marker is still to be written


def test_parts_of_other_generations_and_before_the_newest_checkpoint_are_void() -> None:
    life = _life()
    assert _can_complete(life, 9, generation=1)  # it may have been planned after this was decided
    life.state = replace(life.state, num_generations=2)
    assert not _can_complete(life, 9, generation=1) and not _can_complete(life, 9, term=2)
    assert not _can_complete(life, 3) and not _can_complete(life, 2)


def test_parts_are_void_once_a_rank_without_one_has_written_a_later_one() -> None:
    life = _life()
    _wrote(life, 0, 9)
    _wrote(life, 1, 14)
    assert not _can_complete(life, 9) and _can_complete(life, 14)


def test_a_part_of_a_rank_that_is_lost_since_counts() -> None:
    life = _life()
    _wrote(life, 1, 9)
    life.kill(life.state.members[1])
    assert _can_complete(life, 9)
    _wrote(life, 0, 9)
    assert _can_complete(life, 9) and [c.step for c in complete_checkpoints(life.state, life.seen())] == [9]


def test_parts_are_void_once_a_rank_without_one_is_lost() -> None:
    life = _life()
    _wrote(life, 0, 9)
    life.kill(life.state.members[1])
    assert not _can_complete(life, 9)
    life.state = replace(life.state, worker_group=life.state.members[:1])
    life.lost.clear()
    assert not _can_complete(life, 9)
