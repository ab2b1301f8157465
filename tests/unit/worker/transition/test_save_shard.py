"""Shards that the ranks of a world save: each element of the state once."""

import errno
import gc
import math
import os
import resource
import signal
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from orchestrator.checkpoint.manifest import checkpoint_name, manifest_of
from orchestrator.checkpoint.read import CheckpointReader
from orchestrator.checkpoint.shard_file import ShardPiece, read_shards
from orchestrator.checkpoint.shard_image import ShardMemory
from orchestrator.checkpoint.write import commit
from orchestrator.elastic.expert_change import ExpertSet
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.inventory import inventory
from orchestrator.elastic.state_layout import StateLayout, training_layout
from orchestrator.elastic.state_spec import ParamSpec, saved_shapes
from orchestrator.elastic.world import World
from orchestrator.protocol.messages import Directive
from orchestrator.protocol.worker_phase import Phase
from orchestrator.protocol.worker_report import ShardWritten
from orchestrator.spec.job import JobSpec
from orchestrator.spec.train import TrainSpec
from orchestrator.state.fingerprint import MemoryGuard
from orchestrator.state.ranges import NamedRanges
from orchestrator.storage.caller import Caller, call_here
from orchestrator.storage.condition import StorageCondition, StorageTrouble
from orchestrator.storage.reserve import RESERVE_BYTES, reserve_in
from orchestrator.worker.runtime.errors import AbortedGeneration, StateCorrupted
from orchestrator.worker.runtime.mailbox import WorkerMailbox
from orchestrator.worker.shard.shard import TrainingProgress
from orchestrator.worker.step.seal import open_seal
from orchestrator.worker.training_loop import SAVED_EVERY_S, LiveShard, TrainingHooks, TrainingLoop
from orchestrator.worker.transition import shard_write
from orchestrator.worker.transition.save_shard import ShardSaver, pieces_of
from tests.support.layouts import layout_of_state

PARAMS = [ParamSpec("norm", (3,), None), ParamSpec("up", (50,), None)] + [
    ParamSpec(f"experts.{e}", (20,), e) for e in range(3)
]
BUFFERS = [("bias", (4,))]
SHAPES = {f"{kind}/{p.name}": p.shape for p in PARAMS for kind in ("master", "exp_avg", "exp_avg_sq")} | {
    "buffer/bias": (4,)
}
PLACEMENTS = [
    pytest.param(ExpertPlacement.balanced(3, 1), id="one"),
    pytest.param(ExpertPlacement.balanced(3, 2), id="uneven"),
    pytest.param(ExpertPlacement(3, 2, ((0,), (0,), (0,))), id="a rank without experts"),
    pytest.param(ExpertPlacement.balanced(3, 5), id="more ranks than experts"),
    pytest.param(ExpertPlacement(3, 3, ((0, 1), (1, 2), (0,))), id="overlapping holders"),
]


def _value(layout: StateLayout, tensor: int) -> torch.Tensor:
    """The masters are the weights; the other kinds have values of their own."""
    name = layout.names[tensor].replace("param/", "master/")
    generator = torch.Generator().manual_seed(sum(name.encode()))
    value = torch.randn(int(layout.numel[tensor]), generator=generator)
    return value.bfloat16() if layout.itemsize[tensor] == 2 else value


def _state(placement: ExpertPlacement, mixed: bool) -> tuple[StateLayout, list[NamedRanges]]:
    """What every rank holds, as an engine would show it."""
    world = World(4, tuple(f"w{r}" for r in range(placement.world_size)))
    layout = layout_of_state(PARAMS, placement, world, mixed, BUFFERS)
    ranks = []
    for worker in world.members:
        ranges = NamedRanges()
        for tensor, start, stop in layout.ranges_of(worker).tolist():
            ranges.add(layout.names[tensor], start, _value(layout, tensor)[start:stop].clone())
        ranks.append(ranges)
    return layout, ranks


@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_element_is_saved_once_and_is_what_it_was(placement: ExpertPlacement, mixed: bool) -> None:
    layout, ranks = _state(placement, mixed)
    values = {name.replace("param/", "master/"): _value(layout, t) for t, name in enumerate(layout.names)}
    if mixed:
        values |= {n: _value(layout, t) for t, n in enumerate(layout.names) if n.startswith("master/")}
    times: Counter[tuple[str, int]] = Counter()
    for rank, ranges in enumerate(ranks):
        for piece in pieces_of(ranges, layout.tensors, rank, placement):
            times.update((piece.tensor, i) for i in range(piece.start, piece.stop))
            assert piece.array.dtype == np.float32
            assert np.array_equal(piece.array, values[piece.tensor][piece.start : piece.stop].numpy())
    assert times == Counter((name, i) for name, (numel,) in SHAPES.items() for i in range(numel))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_weights_that_are_not_trained_are_saved_once_in_fp32(placement: ExpertPlacement, precision: str) -> None:
    train = TrainSpec.model_validate({"precision": precision, "trainable": [PARAMS[0].name]})
    job = JobSpec(name="frozen").model_copy(update={"train": train})
    tensors = inventory(PARAMS, job, BUFFERS)
    world = World(4, tuple(f"w{r}" for r in range(placement.world_size)))
    layout = training_layout(tensors, placement, world, job.communication)
    times: Counter[str] = Counter()
    for rank, worker in enumerate(world.members):
        ranges = NamedRanges()
        for tensor, start, stop in layout.ranges_of(worker).tolist():
            ranges.add(layout.names[tensor], start, _value(layout, tensor)[start:stop].clone())
        for piece in pieces_of(ranges, tensors, rank, placement):
            assert piece.array.dtype == np.float32
            times[piece.tensor] += piece.stop - piece.start
    assert times == Counter({name: math.prod(shape) for name, shape in saved_shapes(tensors).items()})


def _shard(ranges: NamedRanges, placement: ExpertPlacement, rank: int, seal: MemoryGuard | None = None) -> Any:
    """As much of a shard as is saved: no engine is needed to have ranges."""
    world = World(4, tuple(f"w{r}" for r in range(placement.world_size)))
    groups, engine = SimpleNamespace(placement=placement), SimpleNamespace(ranges=lambda: ranges)
    return SimpleNamespace(
        term=2, world=world, rank=rank, groups=groups, engine=engine, seal=seal, experts=ExpertSet(3)
    )


def test_what_all_ranks_wrote_makes_a_checkpoint_that_reads_back(tmp_path: Path) -> None:
    placement = ExpertPlacement.balanced(3, 2)
    layout, ranks = _state(placement, True)
    progress = TrainingProgress(11, 10, "{}")
    written: list[ShardWritten] = []
    for rank, ranges in enumerate(ranks):
        saver = ShardSaver(tmp_path, lambda _: layout.tensors, "", "", written.append, pytest.fail, pytest.fail)
        saver.save(_shard(ranges, placement, rank), progress)
        saver.wait()
    assert [(w.step, w.generation, w.rank) for w in written] == [(11, 4, 0), (11, 4, 1)]
    assert all(0.0 < shard.cost_s < 60.0 for shard in written)
    shards = read_shards(tmp_path, written, term=2)
    meta: dict[str, Any] = dict(shards[0][1].meta or {})
    assert (meta.pop("shapes"), meta.pop("compression"), meta.pop("world_size")) != (None, None, None)
    assert meta.pop("experts") == {"num_experts": 3, "families": []}
    assert written[0].meta_sha256 == written[1].meta_sha256 and TrainingProgress(**meta) == progress
    assert shards[1][1].meta is None
    reader = CheckpointReader(commit(tmp_path, manifest_of(shards, run_id="r", term=2, shapes=SHAPES)))
    reader.verify()
    for tensor, name in enumerate(layout.names):
        if not name.startswith("param/"):
            value = _value(layout, tensor).numpy()
            assert np.array_equal(reader.read(name, 0, len(value)).reshape(-1), value)


class Scene:
    """A saver of one rank, with what it reports."""

    def __init__(self, checkpoints: Path, caller: Caller = call_here) -> None:
        self.written: list[ShardWritten] = []
        self.reasons: SimpleQueue[StorageTrouble | None] = SimpleQueue()
        self.failures: list[Exception] = []
        report = (self.written.append, self.reasons.put, self.failures.append)
        self._placement = ExpertPlacement.balanced(3, 1)
        layout, (self.ranges,) = _state(self._placement, False)
        self.saver = ShardSaver(checkpoints, lambda _: layout.tensors, "", "", *report, caller)

    def save(self, step: int, seal: MemoryGuard | None = None) -> None:
        self.saver.save(self.shard(seal), TrainingProgress(step, step + 1, "{}"))

    def shard(self, seal: MemoryGuard | None = None) -> Any:
        return _shard(self.ranges, self._placement, 0, seal)

    def loop(self) -> Any:
        """A training loop after step 3, whose next step finds out whether the memory has changed, and aborts then."""

        def step(shard: Any, *_: object) -> None:
            open_seal(shard, 4)
            raise AbortedGeneration("a peer is lost")

        loop: Any = object.__new__(TrainingLoop)
        loop._saver, loop._position = self.saver, SimpleNamespace(step=3, progress=None)
        loop._train_step = SimpleNamespace(step=step)
        loop._snapshots = SimpleNamespace(wants_gradients=lambda step: False)
        return loop


def _num_copies() -> int:
    """Shards in memory of this process, to be written."""
    links = (Path(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd"))
    return sum("memfd:shard" in str(link.readlink()) for link in links if link.is_symlink())


@pytest.fixture
def refusing(tmp_path: Path) -> Path:
    """Where checkpoints belong, with a file in its place."""
    checkpoints = tmp_path / "checkpoints"
    checkpoints.write_text("a file where a directory is needed")
    return checkpoints


REFUSED = StorageTrouble(StorageCondition.AWAY, "a checkpoint can't be written: Not a directory")


def test_what_storage_refuses_is_written_later(refusing: Path) -> None:
    """The state is that of its step. The copy goes once it is written."""
    scene = Scene(refusing)
    scene.save(3)
    assert scene.reasons.get(timeout=60.0) == REFUSED and scene.saver.is_late
    first = next(held for _, held in scene.ranges)
    before = first.data.clone()
    first.data.fill_(9.0)
    refusing.unlink()
    assert scene.saver.wait(60.0) and not scene.saver.is_late
    assert [shard.step for shard in scene.written] == [3] and scene.failures == []
    assert _num_copies() == 0
    first.data.copy_(before)
    scene.save(5)
    assert scene.saver.wait(60.0) and [shard.step for shard in scene.written] == [3, 5]
    first_file, second_file = (refusing / checkpoint_name(w.step, 2, 4) / w.file for w in scene.written)
    saved, again = load_file(first_file), load_file(second_file)
    assert saved.keys() == again.keys() and all(np.array_equal(saved[key], again[key]) for key in saved)


@pytest.fixture
def may_copy(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Copies are made once it is set."""
    gate = threading.Event()

    class Gated(ShardMemory):
        def __init__(self, *args: Any) -> None:
            assert gate.wait(60.0)
            super().__init__(*args)

    monkeypatch.setattr("orchestrator.worker.transition.save_shard.ShardMemory", Gated)
    yield gate
    gate.set()


def _in_thread(work: Callable[[], None]) -> "Future[None]":
    done: Future[None] = Future()
    threading.Thread(target=lambda: done.set_result(work()), daemon=True).start()
    return done


def test_training_continues_while_its_shard_is_copied_and_waits_before_an_update(
    tmp_path: Path, may_copy: threading.Event
) -> None:
    scene = Scene(tmp_path)
    saved = {name: held.data.clone() for name, held in scene.ranges}
    live = SimpleNamespace(progress=TrainingProgress(3, 4, "{}"))
    hooks = TrainingHooks(
        **dict.fromkeys(("mailbox", "preparer", "position", "timer")),  # type: ignore[arg-type]
        live=live,
        snapshots=SimpleNamespace(copied=lambda: None),
        saver=scene.saver,
    )
    scene.save(3)  # returns, though nothing is copied yet
    assert scene.saver._write is not None and not scene.saver._write._is_copied.is_set()
    update = _in_thread(hooks.before_update)
    with pytest.raises(TimeoutError):
        update.result(0.1)
    assert live.progress is not None  # the state is still that of a finished step
    may_copy.set()
    update.result(60.0)
    assert live.progress is None
    for _, range_ in scene.ranges:
        range_.data.fill_(9.0)
    assert scene.saver.wait(60.0)
    (written,) = scene.written
    for key, values in load_file(tmp_path / checkpoint_name(3, 2, 4) / written.file).items():
        name = key.rpartition("[")[0].replace("master/", "param/")
        assert np.array_equal(values, saved[name].numpy()), key


def test_a_forward_pass_that_changes_a_buffer_does_not_change_what_is_saved(
    tmp_path: Path, may_copy: threading.Event
) -> None:
    """Before the copy is made; a buffer isn't guarded by the wait before an update."""
    scene = Scene(tmp_path)
    bias = scene.ranges.view("buffer/bias", 0, 4)
    before = bias.clone()
    scene.save(3)
    bias.add_(1.0)
    may_copy.set()
    assert scene.saver.wait(60.0)
    (written,) = scene.written
    saved = load_file(tmp_path / checkpoint_name(3, 2, 4) / written.file)
    (values,) = [values for key, values in saved.items() if key.startswith("buffer/bias")]
    assert np.array_equal(values, before.numpy()) and not np.array_equal(values, bias.numpy())


def test_a_newer_save_waits_for_the_copy_before_it_and_takes_its_place(
    tmp_path: Path, may_copy: threading.Event
) -> None:
    scene = Scene(tmp_path)
    scene.save(3)
    second = _in_thread(lambda: scene.save(4))
    with pytest.raises(TimeoutError):
        second.result(0.1)
    may_copy.set()
    second.result(60.0)
    scene.saver.copied()
    assert scene.saver.wait(60.0) and [shard.step for shard in scene.written] == [4]


@pytest.mark.parametrize("error", [OSError(errno.ENOMEM, "no memory"), MemoryError(), RuntimeError("can't allocate")])
def test_a_state_that_can_not_be_copied_is_not_saved_and_nothing_of_it_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The worker goes on. A repeat for the same step saves it."""

    def no_memory(pieces: list[ShardPiece], *args: object) -> ShardMemory:
        raise error

    scene = Scene(tmp_path)
    extra = torch.zeros(4)
    held = weakref.ref(extra)
    scene.ranges.add("buffer/bias", 4, extra)
    del extra
    with monkeypatch.context() as patched:
        patched.setattr("orchestrator.worker.transition.save_shard.ShardMemory", no_memory)
        scene.save(3)
        scene.saver.copied()
        assert scene.saver.wait(60.0) and not scene.saver.is_writing
    del scene.ranges._ranges["buffer/bias"][-1]
    gc.collect()
    assert held() is None
    assert scene.written == scene.failures == [] and scene.reasons.empty()
    scene.save(3)
    assert scene.saver.wait(60.0) and [shard.step for shard in scene.written] == [3]


def test_a_copy_that_fails_half_way_leaves_no_memory_in_use(tmp_path: Path) -> None:
    """The process may have no file of this size."""
    scene = Scene(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        scene.save(3)
        scene.saver.copied()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert scene.saver.wait(60.0) and scene.written == scene.failures == []
    assert _num_copies() == 0


def test_a_copy_that_fails_in_another_way_is_an_error_of_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise ValueError("a length doesn't fit")

    monkeypatch.setattr("orchestrator.worker.transition.save_shard.ShardMemory", broken)
    scene = Scene(tmp_path)
    scene.save(3)
    scene.saver.copied()
    assert scene.saver.wait(60.0) and [str(error) for error in scene.failures] == ["a length doesn't fit"]


def test_a_checkpoint_costs_what_training_waited_for_its_copy(tmp_path: Path, may_copy: threading.Event) -> None:
    """Not the time in which it was copied beside training."""
    scene = Scene(tmp_path)
    for step, waits in ((3, False), (4, True)):
        may_copy.clear()
        scene.save(step)
        write, update = scene.saver._write, _in_thread(scene.saver.copied) if waits else None
        while waits and write is not None and write._awaited_s == float("inf"):
            time.sleep(0.01)
        time.sleep(1.5)  # the time that counts, or doesn't
        may_copy.set()
        assert scene.saver.wait(60.0)
        if update is not None:
            update.result(60.0)
    beside, waited = scene.written
    assert 0.0 < beside.cost_s < 1.5 <= waited.cost_s


def _finishing(scene: Scene) -> tuple[WorkerMailbox, "Future[None]"]:
    """A loop that writes the last checkpoint, of step 3, in a thread."""
    loop, mailbox = scene.loop(), WorkerMailbox("w0", 1)
    loop._mailbox, loop._position.progress = mailbox, TrainingProgress(3, 4, "{}")
    return mailbox, _in_thread(lambda: loop.finish(LiveShard(scene.shard(), None)))


def _until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_the_last_checkpoint_is_tried_again_until_there_is_memory_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []

    def scarce(*args: Any) -> ShardMemory:
        tries.append(len(tries))
        if len(tries) < 3:
            raise MemoryError
        return ShardMemory(*args)

    monkeypatch.setattr("orchestrator.worker.transition.save_shard.ShardMemory", scarce)
    monkeypatch.setattr("orchestrator.worker.training_loop.AGAIN_S", 0.01)
    scene = Scene(tmp_path)
    mailbox, finished = _finishing(scene)
    _until(lambda: mailbox.state.phase is Phase.FINISHED)
    assert [shard.step for shard in scene.written] == [3] and len(tries) == 3
    mailbox.put(Directive(term=1, seq=1, checkpoint_generation=4, checkpoint_done=3))
    finished.result(60.0)


def test_the_last_checkpoint_waits_for_an_earlier_one_that_is_not_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_write, "LATE_AFTER_S", 120.0)
    answers, hangs = threading.Event(), threading.Event()

    def caller(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if kwargs["step"] == 2:
            hangs.set()
            assert answers.wait(120.0)
        return function(*args, **kwargs)

    scene = Scene(tmp_path, caller)
    scene.save(2)
    assert hangs.wait(60.0)
    mailbox, finished = _finishing(scene)
    with pytest.raises(TimeoutError):
        finished.result(2 * SAVED_EVERY_S)
    assert scene.saver._newest == (2, 4)
    answers.set()
    _until(lambda: mailbox.state.phase is Phase.FINISHED)
    assert [shard.step for shard in scene.written] == [2, 3]
    mailbox.put(Directive(term=1, seq=1, checkpoint_generation=4, checkpoint_done=3))
    finished.result(60.0)


def test_the_last_checkpoint_replaces_one_that_storage_refuses(refusing: Path) -> None:
    scene = Scene(refusing)
    scene.save(2)
    assert scene.reasons.get(timeout=60.0) == REFUSED
    mailbox, finished = _finishing(scene)
    _until(lambda: scene.saver._newest == (3, 4))
    refusing.unlink()
    _until(lambda: mailbox.state.phase is Phase.FINISHED)
    assert [shard.step for shard in scene.written] == [3]
    mailbox.put(Directive(term=1, seq=1, checkpoint_generation=4, checkpoint_done=3))
    finished.result(60.0)


@pytest.mark.parametrize("then", ["the next step begins", "the next step is abandoned", "the generation ends"])
@pytest.mark.parametrize("changed", [False, True], ids=["unchanged", "changed"])
def test_a_state_that_is_guarded_is_reported_once_it_was_found_unchanged(
    tmp_path: Path, then: str, changed: bool
) -> None:
    """Else the copy may hold what a broken memory made of it."""
    scene = Scene(tmp_path)
    seal = MemoryGuard(scene.ranges)
    seal.close()
    scene.save(3, seal)
    scene.saver.copied()
    if changed:
        scene.ranges.view("param/norm", 1, 2).add_(1.0)
    assert scene.saver.wait(60.0) and scene.written == [] and scene.saver.is_unverified
    loop, live = scene.loop(), LiveShard(scene.shard(seal), None)
    if then == "the generation ends":
        with pytest.raises(StateCorrupted) if changed else nullcontext():
            loop.release(live)
    else:
        with pytest.raises(StateCorrupted if changed else AbortedGeneration):
            loop._step(live, None)
        if then == "the next step is abandoned":
            loop.release(live)
        else:
            scene.saver.verified()
    assert [shard.step for shard in scene.written] == ([] if changed else [3])
    assert not scene.saver.is_unverified and not seal.open()


def test_a_guarded_state_that_is_written_after_the_check_is_reported_then(refusing: Path) -> None:
    scene = Scene(refusing)
    scene.save(3, MemoryGuard(scene.ranges))
    assert scene.reasons.get(timeout=60.0) == REFUSED
    scene.saver.verified()
    assert scene.written == []
    refusing.unlink()
    assert scene.saver.wait(60.0) and [shard.step for shard in scene.written] == [3]


def test_without_a_thread_training_continues_and_the_next_step_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    scene = Scene(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_thread)
        scene.save(3)
    scene.saver.copied()  # returns
    assert scene.saver.wait(0.0) and not scene.saver.is_writing
    scene.save(4)
    assert scene.saver.wait(60.0) and [shard.step for shard in scene.written] == [4] and scene.failures == []


def test_the_training_thread_does_not_wait_for_an_earlier_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The storage of the first one hangs."""
    monkeypatch.setattr(shard_write, "LATE_AFTER_S", 120.0)
    answers, hangs = threading.Event(), threading.Event()

    def caller(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if kwargs["step"] == 3:
            hangs.set()
            assert answers.wait(120.0)
        return function(*args, **kwargs)

    scene = Scene(tmp_path, caller)
    scene.save(3)
    assert hangs.wait(60.0) and scene.saver.is_writing and not scene.saver.is_late
    began_s = time.monotonic()
    scene.save(5)
    scene.saver.copied()
    assert time.monotonic() - began_s < shard_write.LATE_AFTER_S / 2
    assert scene.saver.wait(60.0) and [shard.step for shard in scene.written] == [5]
    earlier = [thread for thread in threading.enumerate() if thread.name == "checkpoint"]
    answers.set()
    for thread in earlier:
        thread.join(60.0)
    assert [shard.step for shard in scene.written] == [5] and scene.failures == []
    scene.save(7)
    assert scene.saver.wait(60.0) and [shard.step for shard in scene.written] == [5, 7]


def test_a_write_abandoned_while_storage_refuses_it_is_not_reported_later(refusing: Path) -> None:
    """One thread gives it up, while the other one is about to report the refusal."""
    scene = Scene(refusing)
    scene.saver.begin(4)
    gives_up: list[Future[None]] = []

    def give_up() -> None:
        scene.saver.begin(5)
        scene.saver.begin(6)

    def refuse(why: StorageTrouble | None) -> None:
        if why is not None:
            _until(lambda: scene.saver.is_writing)  # `save` knows its thread
            gives_up.append(_in_thread(give_up))
            with pytest.raises(TimeoutError):  # it waits for this report
                gives_up[0].result(0.2)
        scene.reasons.put(why)

    scene.saver._refused = refuse
    scene.save(3)
    assert scene.reasons.get(timeout=60.0) == REFUSED and scene.reasons.get(timeout=60.0) is None
    gives_up[0].result(60.0)
    assert scene.saver.wait(60.0) and scene.reasons.empty()


def test_a_newer_shard_replaces_a_late_one(refusing: Path) -> None:
    scene = Scene(refusing)
    scene.save(3)
    assert scene.reasons.get(timeout=60.0) == REFUSED
    scene.save(7)
    refusing.unlink()
    assert scene.saver.wait(60.0)
    assert [shard.step for shard in scene.written] == [7]


def test_a_step_is_saved_once(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    scene = Scene(tmp_path / "run" / "checkpoints")
    for step in (3, 3):
        scene.save(step)
    assert scene.saver.wait(60.0) and [shard.step for shard in scene.written] == [3]


def test_a_late_shard_is_given_up_with_the_generation_after_the_next(refusing: Path) -> None:
    scene = Scene(refusing)
    scene.saver.begin(4)
    scene.save(3)  # in generation 4
    assert scene.reasons.get(timeout=60.0) == REFUSED
    scene.saver.begin(5)
    assert not scene.saver.wait(0.0)
    scene.saver.begin(6)
    assert scene.saver.wait(60.0) and scene.written == []
    reasons = [scene.reasons.get() for _ in range(scene.reasons.qsize())]
    assert reasons[-1] is None  # it waits for nothing any more


@pytest.mark.parametrize("free", ["none", "what was reserved"])
def test_no_attempt_is_made_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: str) -> None:
    """It would take the last room from others until it fails, or that which was given up for the journal."""
    left = SimpleNamespace(total=2**30, free=0 if free == "none" else RESERVE_BYTES)
    if free == "none":
        reserve_in(tmp_path).touch()
    monkeypatch.setattr("orchestrator.checkpoint.write.shutil.disk_usage", lambda place: left)
    monkeypatch.setattr("orchestrator.worker.transition.shard_write.AGAIN_S", 0.01)
    scene = Scene(tmp_path / "checkpoints")
    scene.save(3)
    for _ in range(3):
        trouble = scene.reasons.get(timeout=60.0)
        assert trouble is not None and trouble.condition is StorageCondition.FULL and "No space left" in trouble.why
    assert not (tmp_path / "checkpoints").exists()
    left.free = 2**29
    assert scene.saver.wait(60.0) and [shard.step for shard in scene.written] == [3]


def test_a_shard_that_changes_before_it_is_read_back_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One byte of the real file is flipped at the moment between write and read-back."""
    attempts = []
    drop = os.posix_fadvise

    def damage_first(descriptor: int, *args: int) -> None:
        is_dropped = args[-1] == os.POSIX_FADV_DONTNEED
        if is_dropped:
            attempts.append([path.name for path in tmp_path.rglob("*") if path.is_file()])
        if is_dropped and len(attempts) == 1:
            with Path(f"/proc/self/fd/{descriptor}").open("r+b") as file:
                file.seek(-3, os.SEEK_END)
                byte = file.read(1)[0]
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte ^ 1]))
                os.fsync(file.fileno())
        drop(descriptor, *args)

    monkeypatch.setattr(os, "posix_fadvise", damage_first)
    scene = Scene(tmp_path)
    scene.save(3)
    trouble = scene.reasons.get(timeout=60.0)
    assert trouble is not None and "reads back changed: block 0 has sha256" in trouble.why
    assert scene.written == [] and [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert scene.saver.wait(60.0) and scene.failures == [] and len(attempts) == 3  # the changed file is read twice
    assert [len(names) for names in attempts] == [1, 1, 1] and attempts[0] == attempts[1] != attempts[2]
    shards = read_shards(tmp_path, scene.written, term=2)
    with CheckpointReader(commit(tmp_path, manifest_of(shards, run_id="r", term=2, shapes=SHAPES))) as r:
        r.verify()


def test_an_error_that_is_not_of_storage_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*args: object, **kwargs: object) -> None:
        raise ValueError("a range is named twice")

    monkeypatch.setattr("orchestrator.worker.transition.save_shard.write_image", write)
    scene = Scene(tmp_path)
    scene.save(3)
    assert scene.saver.wait(60.0)
    assert [str(error) for error in scene.failures] == ["a range is named twice"]


def test_progress_survives_json() -> None:
    progress = TrainingProgress(7, 5, '{"seed": 3}')
    assert TrainingProgress.from_json(progress.to_json()) == progress
    assert TrainingProgress.from_json(replace(progress, step=8).to_json()) != progress


@pytest.mark.parametrize("text", ["{}", '{"step": 1, "num_updates": 1, "sampler": "", "more": 1}', "no JSON"])
def test_progress_of_another_form_is_refused(text: str) -> None:
    with pytest.raises((TypeError, ValueError)):
        TrainingProgress.from_json(text)
