"""Micro-batches that grow until they fill the memory that workers have, and shrink where they would take more."""

from dataclasses import dataclass, field, replace

import pytest

from orchestrator.policy.rescale.micro_batch import (
    GROWTH,
    HIGH,
    PROBE_STEPS,
    SEEN_FACTOR,
    TARGET,
    MemoryShare,
    next_tokens,
    shares_of,
)
from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.run_parts import Probe
from orchestrator.protocol.messages import GenerationPlan, StoreAddress
from orchestrator.protocol.worker_report import MicroBatchMemory
from orchestrator.sampling.micro_batches import MicroBatchSize
from tests.unit.policy.imagined import Life, limits_of

GB = 10**9
LENGTH = 512

PLAIN = MicroBatchMemory(
    generation=0,
    sequence_length=LENGTH,
    steps=PROBE_STEPS,
    tokens=LENGTH,
    num_micro_batches=64,
    kept_bytes=LENGTH * 100_000,
    resident_bytes=GB,
    limit_bytes=8 * GB,
    used_bytes=3 * GB,
    place="host",
    is_gpu=False,
)


@dataclass
class Machine:
    """Workers on one node, which have `base` and take `per_token` beyond; what they have freed they keep, until
    micro-batches get smaller. Below `reserve` nothing of it shows."""

    limit: int = 8 * GB
    base: int = GB
    reserve: int = 0
    per_token: int = 130_000
    kept_per_token: int = 100_000
    others: int = GB
    rows: int = 256
    length: int = LENGTH
    resident: dict[str, int] = field(default_factory=dict)
    given: dict[str, int] = field(default_factory=dict)
    steps: dict[tuple[str, int, int], int] = field(default_factory=dict)

    def measured(self, worker: str, plan: GenerationPlan) -> MicroBatchMemory:
        at_once = max(1, plan.micro_batch.tokens // self.length)
        tokens = self.length * at_once
        needed = self.base + max(self.reserve, self.per_token * tokens)
        self.resident = {w: taken for w, taken in self.resident.items() if w in plan.world}
        if plan.micro_batch.tokens < self.given.get(worker, 0):
            self.resident.pop(worker, None)  # it gives back what larger micro-batches took
        self.given[worker] = plan.micro_batch.tokens
        self.resident[worker] = max(self.resident.get(worker, 0), needed)
        key = (worker, plan.generation, self.length)
        self.steps[key] = self.steps.get(key, 0) + 1
        return MicroBatchMemory(
            generation=plan.generation,
            sequence_length=self.length,
            steps=self.steps[key],
            tokens=tokens,
            num_micro_batches=-(-self.rows // at_once),
            kept_bytes=self.kept_per_token * tokens,
            resident_bytes=self.resident[worker],
            limit_bytes=self.limit,
            used_bytes=self.others + sum(self.resident.values()),
            place="host",
            is_gpu=False,
        )


def _limits(**changes: object) -> RunLimits:
    fitted = {"steps": 400, "micro_batch": MicroBatchSize(tokens=LENGTH), "fits_memory": True, "global_batch_size": 256}
    return limits_of(**(fitted | changes))


def _fitted(machine: Machine, steps: int = 60, **changes: object) -> Life:
    life = Life(_limits(**changes), measured=machine.measured)
    life.run_until(lambda: life.step == steps)
    return life


def _tokens(life: Life) -> int:
    assert life.state.current is not None
    return life.state.current.micro_batch.tokens


@pytest.mark.parametrize("reserve", [0, GB])
@pytest.mark.parametrize("per_token", [100_000, 130_000, 150_000])
def test_micro_batches_grow_until_they_fill_each_workers_share(reserve: int, per_token: int) -> None:
    machine = Machine(reserve=reserve, per_token=per_token)
    life = _fitted(machine)
    share = (machine.limit - machine.others) // 2
    assert all(0.8 * share < resident <= TARGET * share for resident in machine.resident.values())
    assert len(life.of_kind("micro_batch_fitted")) <= 6
    assert not life.state.rescales and not life.state.recoveries
    assert life.state.current is not None and life.state.current.micro_batch.multiple == 2


def test_micro_batches_stop_growing_once_every_worker_has_one() -> None:
    machine = Machine(limit=1000 * GB, rows=16)
    life = _fitted(machine, global_batch_size=16)
    assert _tokens(life) >= 8 * LENGTH
    before = len(life.of_kind("micro_batch_fitted"))
    life.run_until(lambda: life.step == 200)
    assert len(life.of_kind("micro_batch_fitted")) == before <= 3


def test_rows_of_one_length_change_only_by_whole_rows() -> None:
    """Room for a quarter more, which is no row."""
    machine = Machine(limit=2 * (GB + int(1.25 * LENGTH * 150_000 / TARGET)) + GB)
    assert _fitted(machine).of_kind("micro_batch_fitted") == []


def test_what_was_measured_in_another_generation_counts_for_nothing() -> None:
    life = Life(_limits(), measured=lambda worker, plan: replace(PLAIN, generation=7))
    life.run_until(lambda: life.step == 60)
    assert not life.of_kind("micro_batch_fitted")


def test_a_smaller_world_begins_with_smaller_micro_batches_and_a_larger_one_with_equal_ones() -> None:
    machine = Machine()
    life = _fitted(machine, initial_workers=4)
    full = _tokens(life)
    life.scale(2)
    life.run_until(lambda: life.state.current is not None and life.state.current.world.size == 2)
    assert (
        _tokens(life) == full // 2 and life.state.current is not None and life.state.current.micro_batch.multiple == 2
    )
    halved = _tokens(life)
    life.scale(3)
    life.run_until(lambda: life.state.current is not None and life.state.current.world.size == 3)
    assert _tokens(life) == halved


def test_out_of_memory_halves_micro_batches_for_good() -> None:
    machine = Machine()
    life = _fitted(machine)
    full = _tokens(life)
    life.causes = {"w1": "out_of_memory"}
    life.kill("w1")
    life.run_until(lambda: life.step == 200)
    (note,) = life.of_kind("micro_batch_reduced")
    assert (note.from_tokens, note.to_tokens) == (full, full // 2)
    assert len(life.state.members) == 2
    assert _tokens(life) < full


def test_rows_of_another_length_are_measured_again() -> None:
    """Longer rows take more for each token; micro-batches keep their tokens until that is known."""
    machine = Machine()
    life = _fitted(machine)
    full = _tokens(life)
    machine.length, machine.per_token, machine.kept_per_token = 4 * LENGTH, 170_000, 120_000
    life.run_until(lambda: life.step == 120)
    assert _tokens(life) < full
    share = (machine.limit - machine.others) // 2
    assert max(machine.resident.values()) < share


def test_workers_of_a_node_share_what_others_leave() -> None:
    other = replace(PLAIN, used_bytes=GB, place="elsewhere")
    memory = {"a": PLAIN, "b": replace(PLAIN, resident_bytes=2 * GB), "c": other}
    assert shares_of(memory, None) == {
        "a": MemoryShare(4 * GB, GB),
        "b": MemoryShare(4 * GB, 2 * GB),
        "c": MemoryShare(8 * GB, GB),
    }
    assert shares_of(memory, 2 * GB)["c"] == MemoryShare(2 * GB, GB)
    on_gpu = {worker: replace(use, is_gpu=True) for worker, use in memory.items()}
    assert shares_of(on_gpu, 2 * GB) == shares_of(memory, None)  # resources.memory is the host's


def test_the_worker_with_the_least_room_decides() -> None:
    memory = {"a": PLAIN, "b": PLAIN}
    shares = {"a": MemoryShare(4 * GB, GB), "b": MemoryShare(int(GB * 1.2), GB)}
    room = TARGET * 1.2 * GB - GB
    assert next_tokens(LENGTH, memory, shares, (), 0) == pytest.approx(LENGTH + room / 150_000, abs=1)


def test_growth_is_bounded_and_slower_where_nothing_is_known() -> None:
    shares = {"a": MemoryShare(400 * GB, GB)}
    assert next_tokens(LENGTH, {"a": PLAIN}, shares, (), 0) == GROWTH * LENGTH
    assert next_tokens(LENGTH, {"a": replace(PLAIN, kept_bytes=0)}, shares, (), 0) == 2 * LENGTH


def test_what_was_seen_to_be_taken_counts_where_it_is_more_than_what_is_kept() -> None:
    before = Probe("a", LENGTH, LENGTH // 2, GB - LENGTH // 2 * 400_000)
    found = next_tokens(LENGTH, {"a": PLAIN}, {"a": MemoryShare(int(1.2 * GB), GB)}, (before,), 0)
    assert found == pytest.approx(LENGTH + (TARGET * 1.2 - 1) * GB / (400_000 * SEEN_FACTOR), abs=1)


def test_micro_batches_of_less_than_a_row_still_grow() -> None:
    """Rows got longer, or the world smaller, before anything was measured."""
    machine = Machine(limit=1000 * GB, length=4 * LENGTH)
    life = _fitted(machine)
    assert _tokens(life) >= 16 * LENGTH
    machine = Machine(limit=1000 * GB)
    life = Life(_limits(initial_workers=4), measured=machine.measured)
    life.run_until(lambda: life.step == 0)
    life.scale(1)
    life.run_until(lambda: life.step == 60)
    assert len(life.state.members) == 1 and _tokens(life) >= 16 * LENGTH


def test_an_abandoned_transition_keeps_the_size_of_micro_batches() -> None:
    machine = Machine()
    life = _fitted(machine)
    full = _tokens(life)
    life.store = None  # no later generation can connect
    life.scale(1)
    life.run_until(lambda: life.step == 80)
    life.kill("w1")
    life.store = StoreAddress("10.0.0.1", 2)
    life.run_until(lambda: life.state.current is not None and life.state.current.world.size == 1)
    assert _tokens(life) == full // 2  # once, not once for each plan


def test_running_out_of_memory_while_larger_micro_batches_are_planned_makes_them_smaller() -> None:
    machine = Machine()
    life = Life(_limits(), measured=machine.measured)
    life.run_until(lambda: life.state.next is not None and bool(life.of_kind("micro_batch_fitted")))
    life.causes = {"w1": "out_of_memory"}
    life.kill("w1")
    life.run_until(lambda: bool(life.of_kind("micro_batch_reduced")))
    (note,) = life.of_kind("micro_batch_reduced")
    assert (note.from_tokens, note.to_tokens) == (LENGTH, LENGTH // 2)


@pytest.mark.parametrize(("after", "is_suspect"), [(2, True), (40, False)])
def test_a_sudden_death_soon_after_micro_batches_grew_is_attributed_to_memory(after: int, is_suspect: bool) -> None:
    machine = Machine()
    life = Life(_limits(), measured=machine.measured)
    life.run_until(lambda: len(life.of_kind("micro_batch_fitted")) == 3 and life.state.next is None)
    begun = life.step
    life.run_until(lambda: life.step == begun + after)
    life.kill("w1")
    life.run_until(lambda: len(life.state.members) == 1)
    assert bool(life.of_kind("micro_batch_reduced")) is is_suspect


def test_memory_taken_by_others_for_a_while_makes_micro_batches_smaller_once() -> None:
    machine = Machine()
    life = _fitted(machine)
    full = _tokens(life)
    machine.others += int(0.7 * GB)
    for size in (3, 2, 3, 2):
        life.scale(size)
        life.run_until(lambda size=size: life.state.current is not None and life.state.current.world.size == size)
        begun = life.step
        life.run_until(lambda begun=begun: life.step == begun + 12)
    assert _tokens(life) > full / 3  # two thirds by three workers becoming two, twice
    machine.others -= int(0.7 * GB)
    life.run_until(lambda: life.step >= 300)
    assert _tokens(life) > full / 2


def test_after_a_return_to_a_checkpoint_a_smaller_world_has_smaller_micro_batches() -> None:
    machine = Machine()
    life = Life(_limits(initial_workers=2), checkpoint_every=5, measured=machine.measured)
    life.run_until(lambda: life.step == 60)
    full = _tokens(life)
    for worker in life.state.members:
        life.kill(worker)
    life.snapshots.clear()
    life.run_until(lambda: life.state.current is None)
    life.scale(1)
    life.run_until(lambda: life.state.current is not None)
    assert life.state.current is not None and life.state.current.world.size == 1
    assert _tokens(life) == full // 2


@pytest.mark.parametrize("grown", [True, False])
def test_micro_batches_shrink_only_while_memory_is_short(grown: bool) -> None:
    before = Probe("a", LENGTH, 2 * LENGTH, GB // 2 if grown else GB)
    short = {"a": MemoryShare(int(GB / (HIGH + 0.01)), GB)}
    assert (next_tokens(4 * LENGTH, {"a": PLAIN}, short, (before,), 0) < 4 * LENGTH) is grown
    assert next_tokens(LENGTH, {"a": PLAIN}, short, (before,), 0) == LENGTH  # no less than a row
