"""Real workers in real processes, driven without Ray: each behind a pipe, and a rendezvous store in the test.

with LocalWorkerGroup(job, store_dir, run_dir, size=3) as group:
    group.start(group.plan(group.ids[:2]))
    group.rescale(group.ids[:3])
"""

import atexit
import gc
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from orchestrator.comm.transport.rendezvous import RendezvousServer
from orchestrator.controller.worker_env import EXACT_ENV
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.recovery_point import find_recovery_point, placement_at_recovery_point, world_of
from orchestrator.elastic.snapshot_layout import buddies_of, second_buddies_of
from orchestrator.elastic.world import World
from orchestrator.policy.state.run_state import Commit
from orchestrator.protocol.messages import (
    Directive,
    Fence,
    FinishMode,
    GenerationPlan,
    Keeper,
    Restore,
    StateSource,
    StoreAddress,
)
from orchestrator.protocol.sent_directive import SentDirective
from orchestrator.protocol.step_record import StepRecord
from orchestrator.protocol.worker_job import WorkerJob
from orchestrator.protocol.worker_phase import Phase
from orchestrator.protocol.worker_report import Handover, Report
from orchestrator.run_records.checkpoints.completion import commit_checkpoint
from orchestrator.spec.job import JobSpec
from tests.support import devices, forks
from tests.support.pacing import Pace

PATIENCE_S = 120.0
COMPILER_PATIENCE_S = 600.0  # of a warm-up that compiles, on a machine that runs other tests
BEGINNING_S = 0.1  # by which steps are late until one is waited for


def _serve(pipe: Connection, env: dict[str, str], device: str, is_shared: bool) -> None:
    forks.begin(env)
    devices.use(device, is_shared=is_shared)
    from orchestrator.worker.actor import Worker
    from tests.support import faults, pacing

    worker = Worker("idle")
    while True:
        method, args = pipe.recv()
        if method == "arm":
            faults.arm(args)
            pipe.send((True, None))
            continue
        if method == "limit":  # the steps that may wait for run storage
            worker._mailbox._most_unpublished = args[0]
            pipe.send((True, None))
            continue
        if method == "memory":
            pipe.send((True, _memory_of(worker)))
            continue
        if method == "renew":
            faults.disarm()
            _await_end(worker)
            name, pace = args
            pacing.follow(pace)
            worker, method, args = Worker(name), "report", (None, -1, 0.0)
        try:
            pipe.send((True, getattr(worker, method)(*args)))
        except Exception as error:
            pipe.send((False, error))


@dataclass(frozen=True)
class Memory:
    """Bytes that a worker's process has in use, and those that it keeps for snapshots beside them."""

    allocated: int
    kept_for_snapshots: int


def _memory_of(worker: Any) -> Memory:
    import torch

    from orchestrator.worker.step.memory_probe import allocated_bytes

    gc.collect()
    kept = worker._trainer._rescaler._factory.snapshot_memory.held_bytes
    return Memory(allocated_bytes(torch.device("cpu")), kept)


def _await_end(worker: Any) -> None:
    """A worker that has finished closes its groups in a separate thread; the next one must not connect to them."""
    if worker.report(None, -1, 0.0).phase is Phase.FINISHED:
        worker._training.join(PATIENCE_S)


class MemberDied(RuntimeError):
    """The process of a member has ended."""


class NoRecoveryPoint(RuntimeError):
    """Live workers don't hold a whole state: only a checkpoint can help."""


class TransitionFailed(RuntimeError):
    """A member could not reach its next generation."""


class Member:
    """A worker process. It may be one worker after another.

    Args:
        is_exact: of jobs with `train.determinism: exact`, whose processes have their own environment.
        env: other variables of its environment.

    Attributes:
        kind: workers of the same one may follow each other in it.
    """

    def __init__(self, is_exact: bool, env: Mapping[str, str]) -> None:
        self.kind = (is_exact, devices.selected, devices.sharing, env)
        self._pipe, theirs = forks.context.Pipe()
        self._lock = threading.Lock()
        env = {**(EXACT_ENV if is_exact else {}), **env}
        self.process = forks.start(_serve, theirs, env, devices.selected, devices.sharing)
        theirs.close()

    def call(self, method: str, *args: Any, patience_s: float = PATIENCE_S) -> Any:
        """What the worker's method returns. Raises MemberDied if the process ends before it has answered."""
        with self._lock:
            try:
                self._pipe.send((method, args))
                if not self._pipe.poll(patience_s):
                    raise TimeoutError(f"process {self.process.pid} did not answer {method} within {patience_s:.0f} s")
                ok, value = self._pipe.recv()
            except (EOFError, ConnectionError):
                self.process.join(PATIENCE_S)  # its end of the pipe is closed a little before it counts as dead
                raise MemberDied(f"process {self.process.pid} was asked for {method}, and has ended") from None
        if not ok:
            raise value
        return value

    def report(self) -> Report:
        report: Report = self.call("report", None, -1, 0.0)
        return report

    def kill(self) -> None:
        """May be repeated."""
        if self.process.is_alive():
            os.kill(self.process.pid or 0, signal.SIGKILL)
        self.process.join()


_idle: list[Member] = []  # processes of earlier crews that ended well


@atexit.register
def _end_the_idle() -> None:
    """multiprocessing would ask them to end by SIGTERM, which a worker takes for a request to hand its shard over."""
    for member in _idle:
        member.kill()


def _num_outputs(store_dir: Path) -> int:
    """Tokens of the vocabulary, or classes, of a store of tokens or of rows."""
    manifest = json.loads((store_dir / "manifest.json").read_text())
    return int(manifest["vocab_size"] if "vocab_size" in manifest else manifest["num_outputs"])


class LocalWorkerGroup:
    """Workers of one run in processes of this machine, and the simplest controller that can direct them.

    Steps are slowed down a little. After a test has awaited a step, later ones are very slow until it awaits another
    one, a fence or the end: so steps are left for what the test does next.

    Args:
        orphan_s: seconds without a call after which a worker exits.
        env: variables of the workers' environment.

    Attributes:
        pace: of their steps.
    """

    def __init__(
        self,
        job: JobSpec,
        store_dir: Path,
        run_dir: Path,
        size: int,
        threads: int = 1,
        orphan_s: float = 3600.0,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._env = env or {}
        run_dir.mkdir(parents=True, exist_ok=True)
        if devices.selected != devices.CPU:
            job = job.model_copy(update={"resources": job.resources.model_copy(update={"gpus": 1.0})})
        self._rendezvous = RendezvousServer("127.0.0.1")
        self.job = WorkerJob(
            run_id="test",
            job_json=job.model_dump_json(by_alias=True),
            store_dir=str(store_dir),
            storage_dir=str(run_dir),
            head_host="127.0.0.1",
            threads=threads,
            orphan_s=orphan_s,
            vocab_size=_num_outputs(store_dir),
        )
        self.num_experts, self.is_exact = job.model.n_routed_experts, job.train.is_exact
        self._copies, self._compiles = job.protection.copies, job.train.torch_compile
        self.members: dict[str, Member] = {}
        self.directive = Directive(term=1, seq=0)
        self.newest_generation = -1  # of all that were planned
        self._keepers = 0  # that were chosen
        self.records: dict[int, StepRecord] = {}
        self.final: dict[str, Report] = {}  # last reports, once the run is finished
        self.pace = Pace()
        self.add(size)

    def add(self, count: int) -> list[str]:
        """More workers, warmed in parallel; those that compile after the first one, whose code they find on disk."""
        new = [f"w{len(self.members) + i}" for i in range(count)]
        for worker in new:
            kind = (self.is_exact, devices.selected, devices.sharing, self._env)
            idle = next((member for member in _idle if member.kind == kind), None)
            if idle is not None:
                _idle.remove(idle)
            self.members[worker] = idle or Member(self.is_exact, self._env)
        num_alone = 1 if self._compiles else 0
        for worker in new[:num_alone]:
            self._warm(worker)
        with ThreadPoolExecutor(len(new)) as pool:
            list(pool.map(self._warm, new[num_alone:]))
        return new

    def _warm(self, worker: str) -> None:
        self.members[worker].call("renew", worker, self.pace.path)
        patience_s = COMPILER_PATIENCE_S if self._compiles else PATIENCE_S
        self.members[worker].call("warm", self.job, patience_s=patience_s)

    @property
    def ids(self) -> list[str]:
        return list(self.members)

    @property
    def store_address(self) -> StoreAddress:
        return StoreAddress(*self._rendezvous.address())

    def lose_store(self) -> None:
        """The rendezvous store dies, and another one comes in its place."""
        self._rendezvous = RendezvousServer("127.0.0.1")

    def plan(
        self,
        members: list[str],
        source: GenerationPlan | None = None,
        generation: int = 0,
        restore: Restore | None = None,
        step: int | None = None,
        **more: Any,
    ) -> GenerationPlan:
        """`more`: other fields of the plan."""
        world, nodes = World(generation, tuple(members)), more.get("nodes", ())
        placement = more.pop("placement", None)
        if placement is None and source is None:
            placement = ExpertPlacement.balanced(self.num_experts, world.size, nodes)
        elif placement is None:
            placement = ExpertPlacement.rebalanced(source.placement, source.world, world, nodes)
        return GenerationPlan(
            term=1,
            world=world,
            placement=placement,
            source=StateSource(source.world, source.placement, source.world.members, step) if source else None,
            store_prefix=f"1/{generation}",
            store_address=self.store_address,
            **self._buddies(world.size),
            restore=restore,
            **more,
        )

    def _buddies(self, size: int) -> dict[str, tuple[int, ...]]:
        nodes = ["node"] * size
        first = buddies_of(nodes)
        second = second_buddies_of(nodes, first) if self._copies > 1 else ()
        return {"buddies": first, "second_buddies": second}

    def send(self, to: list[str] | None = None, **changes: Any) -> None:
        fields = {**vars(self.directive), **changes, "seq": self.directive.seq + 1}
        self.directive = Directive(**fields)
        planned = [plan.generation for plan in (self.directive.next, self.directive.current) if plan is not None]
        self.newest_generation = max([self.newest_generation, *planned])
        for worker in to if to is not None else self.ids:
            if self.members[worker].process.is_alive():
                known = self.members[worker].report().plans
                self.members[worker].call("direct", SentDirective.of(self.directive, worker, known))

    def await_all(self, workers: list[str], ready: Callable[[Report], bool], patience_s: float = PATIENCE_S) -> None:
        deadline = time.monotonic() + patience_s
        for worker in workers:
            version = -1
            while True:
                report: Report = self.members[worker].call("report", self.newest_step, version, 0.5)
                self.records.update({r.step: r for r in report.history.records})
                if ready(report):
                    break
                if version >= 0:  # it takes longer: perhaps as another one has failed
                    self._check_failures(workers, ready)
                if time.monotonic() > deadline:
                    raise AssertionError(f"{worker} is {report.phase} at step {report.step} after {patience_s} s")
                version = report.version

    def _check_failures(self, workers: list[str], ready: Callable[[Report], bool]) -> None:
        """Raises AssertionError if one of these workers has failed, and that isn't what is waited for."""
        for worker in workers:
            if self.members[worker].process.is_alive():
                report = self.members[worker].report()
                if report.phase is Phase.FAILED and not ready(report):
                    raise AssertionError(f"{worker} failed: {report.health.error}")

    def collect(self, worker: str) -> None:
        """Take over the records of a worker: newcomers to a generation don't know those before it."""
        report: Report = self.members[worker].call("report", self.newest_step, -1, 0.0)
        self.records.update({r.step: r for r in report.history.records})

    @property
    def newest_step(self) -> int:
        return max(self.records, default=-1)

    def start(self, plan: GenerationPlan) -> None:
        self.send(next=plan)
        members = list(plan.world.members)
        self.await_all(members, lambda r: r.phase is Phase.READY and r.generation == plan.generation)
        if self.pace.is_free:
            self.pace.slow_after(0, BEGINNING_S)
        self.send(current=plan, next=None, activated=plan.generation)

    def prepare(self, members: list[str], **more: Any) -> GenerationPlan:
        """Plan the next generation and have it prepared while training goes on. `more`: other fields of the plan."""
        current = self.directive.current
        assert current is not None
        previous = self.directive.next.generation if self.directive.next else current.generation
        plan = self.plan(members, current, max(previous, current.generation) + 1, **more)
        self.send(next=plan)
        self.await_all(list(plan.involved), lambda r: r.transition.prepared >= plan.generation)
        return plan

    def rescale(self, members: list[str], at_step: int | None = None, **more: Any) -> GenerationPlan:
        """A whole rescale: prepare, fence, move, activate. `more`: other fields of the plan."""
        plan = self.prepare(members, **more)
        self.rescale_to(plan, at_step)
        self.await_all(list(plan.involved), lambda r: r.generation == plan.generation)
        self.collect(plan.involved[0])
        self.pace.slow_after(self.newest_step + 1)
        self.send(current=plan, next=None, fence=None, activated=plan.generation, keepers=())
        return plan

    def keep(self, worker: str) -> int:
        """Have a standby keep the snapshots of the only member. Its number as a keeper, at once."""
        current = self.directive.current
        assert current is not None
        self._keepers += 1
        number = self._keepers - 1
        after = self.newest_step
        keeper = Keeper(number, worker, current.generation, self.store_address, f"1/keeper/{number}", after)
        self.send(keepers=(*self.directive.keepers, keeper))
        return number

    def rescale_to(self, plan: GenerationPlan, at_step: int | None = None) -> None:
        """Let the current generation end for `plan`, without waiting."""
        self.pace.free()
        self.send(fence=Fence(plan.generation, at_step))

    def arm(self, *faults: Any) -> None:
        """Let these faults of `tests.support.faults` happen, each in the process that has the rank then."""
        for worker in self.living:
            self.members[worker].call("arm", *faults)

    @property
    def living(self) -> list[str]:
        return [worker for worker, member in self.members.items() if member.process.is_alive()]

    def recover(self, members: list[str], previous: GenerationPlan | None = None, **more: Any) -> GenerationPlan:
        """Go on with `members` from the newest state that the worker group holds, once all have stopped.

        Args:
            previous: the generation before the one that was activated last, if that may still be needed.
            more: other fields of the plan.

        Raises:
            NoRecoveryPoint: no worker or buddy holds every shard.
            MemberDied: somebody has died meanwhile.
            TransitionFailed: a member could not take the state over.
        """
        old = self.directive.current
        assert old is not None
        self.send(aborted=self.newest_generation, next=None, fence=None)

        def has_stopped(report: Report) -> bool:
            return report.phase is Phase.STRANDED or (
                report.phase is Phase.READY and report.generation > old.generation
            )

        self.await_all([w for w in old.world.members if w in self.living], has_stopped)
        origins = [old] if previous is None else [old, previous]
        holdings = {w: self.members[w].report().protection.holdings for w in self.living}
        cut = find_recovery_point([origin.world for origin in origins], holdings)
        if cut is None:
            raise NoRecoveryPoint(holdings)
        origin = next(plan for plan in origins if plan.generation == cut.generation)
        world = World(self.newest_generation + 1, tuple(members))
        placement = ExpertPlacement.rebalanced(
            placement_at_recovery_point(origin.placement, cut.holders), world_of(origin.generation, cut.holders), world
        )
        plan = GenerationPlan(
            term=1,
            world=world,
            placement=placement,
            source=StateSource(origin.world, origin.placement, cut.holders, cut.step),
            store_prefix=f"1/{world.generation}",
            store_address=self.store_address,
            **self._buddies(world.size),
            **more,
        )
        self.send(next=plan)

        def is_ready(report: Report) -> bool:
            if dead := [w for w in members if w not in self.living]:
                raise MemberDied(f"{dead} died on the way to generation {plan.generation}")
            if report.transition.failed_generation == plan.generation:
                raise TransitionFailed(
                    f"{report.worker} could not reach generation {plan.generation}: {report.health.error}"
                )
            return report.phase is Phase.READY and report.generation == plan.generation

        self.await_all(members, is_ready)
        # Not before: until they have gone back themselves, they report steps after the recovery point.
        self.records = {step: record for step, record in self.records.items() if step <= cut.step}
        self.collect(cut.holders[0])
        self.send(current=plan, next=None, activated=plan.generation, keepers=())
        return plan

    def finish(self) -> None:
        assert self.directive.current is not None
        self.pace.free()
        self.send(finish=FinishMode.STOP)
        self.await_finished()

    def await_finished(self, patience_s: float = PATIENCE_S) -> None:
        assert self.directive.current is not None
        self.pace.free()
        members = self.directive.current.world.members
        self.await_all(list(members), lambda r: r.phase is Phase.FINISHED, patience_s)
        self.final = {worker: self.members[worker].report() for worker in members}

    def await_step(self, step: int) -> None:
        assert self.directive.current is not None
        self.pace.slow_after(step + 1)
        self.await_all([self.directive.current.world.members[0]], lambda r: r.step >= step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:  # some may be frozen, or wait for ever
            for member in self.members.values():
                member.kill()
            return
        self.send(checkpoint_generation=10**9)  # so that the training threads of finished workers end
        for member in self.members.values():
            if not member.process.is_alive():
                continue
            if member.report().phase in (Phase.FINISHED, Phase.STANDBY):
                _idle.append(member)
            else:
                member.kill()


def commit_of(worker_group: LocalWorkerGroup, step: int) -> Path:
    """Path of the checkpoint of `step`, after marking it complete as a controller does. All members have finished."""
    shards = [shard for report in worker_group.final.values() for shard in report.shards if shard.step == step]
    complete = Commit(step, 1, shards[0].generation, tuple(shards))
    return Path(commit_checkpoint("test", Path(worker_group.job.storage_dir), complete).path)


def handovers_of(worker_group: LocalWorkerGroup, generation: int) -> list[Handover]:
    """What living workers have measured of the transition to a generation."""
    reports = [worker_group.members[w].report() for w in worker_group.ids if worker_group.members[w].process.is_alive()]
    return [h for r in reports for h in r.transition.handovers if h.generation == generation]


def disturbed_and_undisturbed(
    job: JobSpec, store_dir: Path, tmp_path: Path
) -> tuple[LocalWorkerGroup, LocalWorkerGroup]:
    """A run of two workers through a rescale, a lost worker whose updates are done again from gradients, and a rescale
    to one; and a run of one worker that nothing happens to. Both have ended."""
    runs = []
    for is_disturbed in (True, False):
        with LocalWorkerGroup(job, store_dir, tmp_path / str(is_disturbed), size=3) as worker_group:
            ids = worker_group.ids
            worker_group.start(worker_group.plan(ids[:2] if is_disturbed else ids[:1]))
            if is_disturbed:
                worker_group.await_step(worker_group.newest_step + 3)
                worker_group.rescale(ids)
                worker_group.await_step(worker_group.newest_step + 4)  # whole snapshots, and deltas after them
                worker_group.members[ids[2]].kill()
                worker_group.recover(ids[:2])
                worker_group.await_step(worker_group.newest_step + 3)
                plan = worker_group.rescale(ids[1:2])
                assert all(h.state_identical for h in handovers_of(worker_group, plan.generation))
            worker_group.await_finished()
        runs.append(worker_group)
    disturbed, undisturbed = runs
    return disturbed, undisturbed
