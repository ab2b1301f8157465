"""A worker without torch that speaks the whole protocol, to run controllers on real Ray in seconds.

Its training state is one counter per expert that grows by one a step. Peers meet through files in run storage, and
notice each other's death by process id, as gloo does by its sockets. With its vote a worker tells its counters, which
its buddy keeps in memory. It is told what to do by the job's `envs`:

    SIM_STEP_S   how long a step takes, until there is a file HURRY in run storage (see `simulated_services.hurry`)
    SIM_DEAF     whether SIGTERM is ignored, as a user's C library may do
    SIM_STAGES   as JSON, the first step of each stage
    SIM_DIE      WORKER:MOMENT, or all:MOMENT; who kills itself when: warming, prepared, moving, moving-on after a loss
"""

import ctypes
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from orchestrator.checkpoint.read import CheckpointReader
from orchestrator.checkpoint.shard_file import ShardPiece
from orchestrator.elastic.recovery_point import Holding
from orchestrator.errors import CheckpointCorrupt
from orchestrator.protocol.codec import from_plain, to_plain
from orchestrator.protocol.messages import Directive, FinishMode, GenerationPlan, Restore
from orchestrator.protocol.sent_directive import SentDirective
from orchestrator.protocol.step_record import BatchRecord, StepRecord, StepTiming, UpdateRecord
from orchestrator.protocol.worker_job import WorkerJob
from orchestrator.protocol.worker_phase import Phase
from orchestrator.protocol.worker_report import CHECKPOINT_CORRUPT, Handover, Report, WorkerError
from orchestrator.spec.job import JobSpec
from orchestrator.storage.caller import Caller, call_here
from orchestrator.worker.runtime.mailbox import WorkerMailbox
from tests.support.checkpoints import write_shard
from tests.support.simulated_services import HOLD, HURRY

POLL_S = 0.002
LIVES_EVERY = 10  # polls between two looks whether a peer's process lives, which cost more


def _stage_of(step: int) -> str:
    begun = [(first, name) for name, first in json.loads(os.environ.get("SIM_STAGES", "{}")).items() if first <= step]
    return str(max(begun)[1]) if begun else ""


class PeerLost(RuntimeError):
    """A peer's process is gone while we wait for it."""


class Withdrawn(RuntimeError):
    """The plan that we wait for is not wanted any more."""


class SimulatedWorker:
    """Hosted in place of `orchestrator.worker.actor:Worker`."""

    def __init__(self, worker_id: str, caller: Caller = call_here) -> None:
        if "SIM_DEAF" in os.environ:  # not by `signal`, which Python allows in the main thread only
            ctypes.CDLL(None).signal(signal.SIGTERM, ctypes.c_void_p(int(signal.SIG_IGN)))
        self._me = worker_id
        self._mailbox = WorkerMailbox(worker_id, os.getpid())
        self._counters: dict[int, int] = {}  # the experts that this worker holds
        self._kept: dict[Holding, dict[int, int]] = {}  # snapshots, its own and those it keeps as a buddy
        self._step = -1
        self._saved = -1  # step of the newest checkpoint that it has written
        self._begun = -1

    # -- the face of a worker ----------------------------------------------------------------------------------

    def warm(self, job: WorkerJob) -> Report:
        if self._mailbox.state.phase is Phase.COLD:
            self._job, self._spec = job, JobSpec.model_validate_json(job.job_json)
            self._files, self._hurry = Path(job.storage_dir) / "sim", Path(job.storage_dir) / HURRY
            self._say("pids", str(os.getpid()))
            self._die_at("warming")
            while (Path(job.storage_dir) / HOLD).exists():
                time.sleep(POLL_S)
            self._mailbox.publish(phase=Phase.STANDBY)
            threading.Thread(target=self._run, daemon=True).start()
        return self.report(None, -1, 0.0)

    def direct(self, sent: SentDirective) -> Report:
        directive = sent.whole(self._mailbox.directive.plans)
        if directive is not None:
            self._mailbox.put(directive)
            self._mailbox.publish(unkept=max((keeper.number for keeper in directive.keepers), default=-1))  # keeps none
        return self.report(None, -1, 0.0)

    def report(
        self, after_step: int | None, known_version: int, timeout_s: float, published: int | None = None
    ) -> Report:
        return self._mailbox.report(after_step, known_version, timeout_s, published)

    def shutdown(self) -> None:
        os._exit(0)

    # -- its life ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._live()
        except PeerLost as error:
            self._mailbox.publish(phase=Phase.FAILED, error=WorkerError("peer_lost", str(error)))
        except Exception as error:
            self._mailbox.publish(phase=Phase.FAILED, error=WorkerError("internal", repr(error)))

    def _live(self) -> None:
        while True:
            plan = self._untried(self._mailbox.wait(lambda d: self._untried(d) is not None))
            assert plan is not None
            self._begun = plan.generation
            try:
                if not _is_running(plan.store_address.port):
                    raise PeerLost("the rendezvous store is gone")
                self._meet(plan, "prepared", {}, plan.involved)
                self._mailbox.publish(prepared=plan.generation)
                self._die_at("prepared")
                if self._enter(plan) and not self._train(plan):
                    return
            except (PeerLost, Withdrawn):
                self._abandon_transition(plan)

    def _train(self, plan: GenerationPlan) -> bool:
        """Step after step, through all generations that this worker is a member of. False at the end of the run."""
        while True:
            try:
                self._keep_beginning(plan)
                self._mailbox.publish(phase=Phase.TRAINING, generation=plan.generation)
                following = self._train_to_fence(plan)
                if following is None and self._finish(plan):
                    return False
            except (PeerLost, Withdrawn) as error:
                self._stop(plan, error)
                return True
            assert following is not None
            self._begun = following.generation
            try:
                if not self._enter(following):
                    return True
            except (PeerLost, Withdrawn):
                self._abandon_transition(following)
                return True
            plan = following

    def _finish(self, plan: GenerationPlan) -> bool:
        """Write the last checkpoint and wait until it is marked."""
        self._save(plan)
        self._mailbox.publish(phase=Phase.FINISHED)
        generation = plan.generation
        order = self._mailbox.wait(lambda d: d.has_checkpoint(generation, self._step) or d.aborted >= generation)
        if not order.has_checkpoint(generation, self._step):
            raise PeerLost("the generation was aborted")
        return True

    def _stop(self, plan: GenerationPlan, error: Exception) -> None:
        self._mailbox.publish(
            phase=Phase.STRANDED,
            stopped=plan.generation,
            holdings=tuple(self._kept),
            error=WorkerError("peer_lost", str(error)),
        )

    def _abandon_transition(self, plan: GenerationPlan) -> None:
        phase = Phase.STRANDED if self._kept else Phase.STANDBY
        self._mailbox.publish(phase=phase, failed_generation=plan.generation, holdings=tuple(self._kept))

    def _keep(self, plan: GenerationPlan, votes: dict[str, dict[str, Any]]) -> None:
        """Snapshots of this worker, and of the rank whose buddy it is, after the newest step; two steps are kept."""
        mine = plan.world.rank_of(self._me)
        ranks = [mine, *(ring.index(mine) for ring in plan.rings)]
        for rank in ranks:
            counters = votes[plan.world.members[rank]]["counters"]
            self._kept[Holding(plan.generation, self._step, rank)] = {int(e): n for e, n in counters.items()}
        self._kept = {
            h: state for h, state in self._kept.items() if h.generation >= plan.generation and h.step > self._step - 2
        }

    def _train_to_fence(self, plan: GenerationPlan) -> GenerationPlan | None:
        every = self._spec.checkpoint.every
        while self._step + 1 < self._spec.train.max_steps:
            started = time.time()
            if not self._hurry.exists():
                time.sleep(float(os.environ.get("SIM_STEP_S", "0.02")))  # in place of computing
            order = self._mailbox.directive
            following = self._look_ahead(order)
            ballot = {
                "fence": -1 if following is None else following.generation,
                "finish": order.finish is not FinishMode.NO,
                "save": self._saved < order.checkpoint_from <= self._step + 1,
                "counters": {expert: count + 1 for expert, count in self._counters.items()},
            }
            votes = self._meet(plan, f"step-{self._step + 1}", ballot, plan.world.members)
            self._finish_step(plan, started)
            self._keep(plan, votes)
            is_due = isinstance(every, int) and (self._step + 1) % every == 0
            if (is_due or any(vote["save"] for vote in votes.values())) and self._step + 1 < self._spec.train.max_steps:
                self._save(plan)
            if all(vote["finish"] for vote in votes.values()):
                return None
            if following is not None and all(vote["fence"] == following.generation for vote in votes.values()):
                return following
        return None

    def _look_ahead(self, order: Directive) -> GenerationPlan | None:
        """Prepare the next generation without waiting; give it if its fence is due after this step."""
        plan = order.next
        if plan is None:
            return None
        if self._mailbox.state.transition.prepared < plan.generation and not _is_running(plan.store_address.port):
            self._mailbox.publish(failed_generation=plan.generation)
            return None
        self._say(self._place(plan, "prepared"), "{}")
        if any(self._read(self._place(plan, "prepared"), peer) is None for peer in plan.involved):
            return None
        if self._mailbox.state.transition.prepared < plan.generation:
            self._mailbox.publish(prepared=plan.generation)
        due = order.fence is not None and order.fence.to_generation == plan.generation
        if not due or (order.fence.at_step is not None and self._step + 1 < order.fence.at_step):
            return None
        return plan

    def _finish_step(self, plan: GenerationPlan, started: float) -> None:
        self._step += 1
        self._counters = {expert: count + 1 for expert, count in self._counters.items()}
        rows = self._spec.train.global_batch_size
        self._mailbox.record(
            StepRecord(
                step=self._step,
                generation=plan.generation,
                world_size=plan.world.size,
                loss=5.0 / (1.0 + 0.05 * self._step),
                batch=BatchRecord(rows * 100, self._step * rows, rows, stage=_stage_of(self._step)),
                update=UpdateRecord(self._spec.train.lr, grad_norm=1.0, applied=True),
                timing=StepTiming(step_s=time.time() - started, vote_time=time.time()),
                validation_loss=3.0 if (self._step + 1) % 10 == 0 else None,
            ),
            committed=self._step - 1 if plan.buddies else self._step,
            settled=plan.generation,
            **({"held": self._step - 1} if plan.buddies else {}),
        )

    # -- moves -------------------------------------------------------------------------------------------------

    def _enter(self, plan: GenerationPlan) -> bool:
        """Move into the generation. True if this worker is a member and the generation was activated."""
        if plan.source is not None and self._me not in plan.source.holders:
            self._wait(plan, lambda: self._read(self._place(plan, "fence"), plan.source.holders[0]) is not None)
        self._mailbox.publish(phase=Phase.MOVING, error=None)
        self._die_at("moving")
        if plan.source is not None and plan.source.step is not None:
            self._die_at("moving-on")
        if plan.source is None:
            if plan.restore is not None and (damage := _damage_in(plan.restore)):
                error = WorkerError(CHECKPOINT_CORRUPT, damage)
                self._mailbox.publish(phase=Phase.STANDBY, failed_generation=plan.generation, error=error)
                return False
            self._step = plan.restore.step if plan.restore else -1
            self._counters = dict.fromkeys(plan.placement.experts_of(plan.world.rank_of(self._me)), self._step + 1)
            self._kept = {}
            self._mailbox.go_back_to(self._step)
        else:
            self._hand_over(plan)
        generation = plan.generation
        handover = Handover(generation, self._step, 0.0, 0.0, 0.0, 0.0, 8, 8, True)
        holdings = tuple(self._kept)
        self._mailbox.publish(phase=Phase.READY, generation=generation, handovers=(handover,), holdings=holdings)
        order = self._mailbox.wait(lambda d: d.activated >= generation or self._untried(d) is not None)
        if order.activated < generation:
            return False
        if self._me not in plan.world:
            self._mailbox.publish(phase=Phase.STANDBY, generation=-1)
            return False
        self._mailbox.publish(holdings=())
        return True

    def _keep_beginning(self, plan: GenerationPlan) -> None:
        """The state that the generation begins with."""
        told = self._meet(plan, "beginning", {"counters": self._counters}, plan.world.members)
        older = dict(self._kept)
        self._keep(plan, told)
        self._kept = older | self._kept  # until the generation has a committed step

    def _hand_over(self, plan: GenerationPlan) -> None:
        source = plan.source
        assert source is not None
        step = self._step if source.step is None else source.step
        ranks = [rank for rank, holder in enumerate(source.holders) if holder == self._me]
        held = [self._kept[Holding(source.world.generation, step, rank)] for rank in ranks]
        mine = {"step": step, "counters": {e: n for state in held for e, n in state.items()}} if held else {}
        self._say(self._place(plan, "fence"), "{}")
        told = self._meet(plan, "moved", mine, plan.involved)
        states = [told[worker] for worker in plan.involved if worker in source.holders]
        assert len({state["step"] for state in states}) == 1, f"members stopped at different steps: {states}"
        self._step = states[0]["step"]
        records = self._announce_to_newcomers(plan)
        self._mailbox.go_back_to(self._step, records)
        counters = {int(e): count for state in states for e, count in state["counters"].items()}
        assert set(counters.values()) == {self._step + 1}, f"a counter was lost or counted twice: {counters}"
        if self._me in plan.world:
            self._counters = {e: counters[e] for e in plan.placement.experts_of(plan.world.rank_of(self._me))}

    def _announce_to_newcomers(self, plan: GenerationPlan) -> tuple[StepRecord, ...]:
        """The newest steps, from a holder of the state to those who weren't there."""
        assert plan.source is not None
        mine = [to_plain(record) for record in self._mailbox.records[-256:]]
        told = self._meet(plan, "records", {"records": mine}, plan.involved)
        return tuple(from_plain(StepRecord, plain) for plain in told[plan.source.holders[0]]["records"])

    def _untried(self, order: Directive) -> GenerationPlan | None:
        for plan in (order.next, order.current):
            if plan and plan.generation > self._begun and self._me in plan.involved:
                return plan
        return None

    # -- checkpoints and meetings ------------------------------------------------------------------------------

    def _save(self, plan: GenerationPlan) -> None:
        """Each expert's counter is a tensor of one element, written by the first of its holders."""
        rank, self._saved = plan.world.rank_of(self._me), self._step
        pieces = [
            ShardPiece(f"master/expert.{expert}", 0, 1, np.array([count], dtype=np.float32))
            for expert, count in self._counters.items()
            if plan.placement.holders[expert][0] == rank
        ]
        written = write_shard(
            Path(self._job.storage_dir) / "checkpoints",
            pieces,
            step=self._step,
            term=plan.term,
            generation=plan.generation,
            rank=rank,
            meta=json.dumps({"step": self._step}),
        )
        self._mailbox.publish(shards=(*self._mailbox.state.shards[-3:], written))

    def _meet(
        self, plan: GenerationPlan, name: str, word: dict[str, Any], members: tuple[str, ...]
    ) -> dict[str, dict[str, Any]]:
        """Publish `word` and wait for those of all members."""
        place = self._place(plan, name)
        self._say(place, json.dumps(word))
        for peer in members:
            self._wait(plan, partial(self._has_announced, place, peer), peer)
        return {peer: json.loads(self._read(place, peer) or "{}") for peer in members}

    def _wait(self, plan: GenerationPlan, done: Callable[[], bool], peer: str | None = None) -> None:
        for number in itertools.count(1):
            if done():
                return
            order = self._mailbox.directive
            if order.aborted >= plan.generation:
                raise PeerLost(f"generation {plan.generation} was aborted")
            if all(p is None or p.generation != plan.generation for p in (order.next, order.current)):
                raise Withdrawn(f"generation {plan.generation} is not wanted any more")
            if peer is not None and number % LIVES_EVERY == 0 and not self._lives(peer):
                raise PeerLost(f"{peer} is gone")
            time.sleep(POLL_S)

    def _place(self, plan: GenerationPlan, name: str) -> str:
        return f"{plan.store_prefix.replace('/', '-')}/{name}"

    def _say(self, place: str, word: str) -> None:
        path = self._files / place / self._me
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{self._me}")
        temporary.write_text(word)
        temporary.replace(path)

    def _read(self, place: str, worker: str) -> str | None:
        try:
            return (self._files / place / worker).read_text()
        except FileNotFoundError:
            return None

    def _has_announced(self, place: str, worker: str) -> bool:
        return self._read(place, worker) is not None

    def _lives(self, peer: str) -> bool:
        pid = self._read("pids", peer)
        return pid is None or _is_running(int(pid))  # None: not warm yet

    def _die_at(self, moment: str) -> None:
        if os.environ.get("SIM_DIE") in (f"{self._me}:{moment}", f"all:{moment}"):
            os.kill(os.getpid(), signal.SIGKILL)


def _damage_in(restore: Restore) -> str:
    """What is wrong with a checkpoint; empty if nothing is."""
    try:
        with CheckpointReader(Path(restore.path), restore.digest or None) as reader:
            reader.verify()
    except CheckpointCorrupt as error:
        return str(error)
    return ""


def _is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
