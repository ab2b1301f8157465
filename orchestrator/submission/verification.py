"""Replay of committed steps at another world size, on this machine, to compare bits.

    order = what_to_verify("demo", run_dir)
    for record in done_again(order): ...

Needs run storage, no cluster. The run is only read, and may be active meanwhile.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, TypeVar

from orchestrator.checkpoint.read import choose, list_steps
from orchestrator.controller.worker_group import EXACT_ENV, NCCL_ENV, WORKER_ENV
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.world import World
from orchestrator.errors import NotFinished, OrchestratorError, UsageError
from orchestrator.policy.replay_check import Differences
from orchestrator.policy.state.run_state import StateDecided
from orchestrator.protocol.child_process import PEER_LOST, REPLAY_LINES, Fault, Numerics, ReplayOrder
from orchestrator.protocol.events.base import JournalEntry
from orchestrator.protocol.events.notices import NumericsDiffer, NumericsRecorded
from orchestrator.protocol.events.training import StageDecided
from orchestrator.protocol.messages import GenerationPlan, PastWorld, Restore, StepRecord, StoreAddress, WorkerJob
from orchestrator.run_records.run_history import committed_steps, read_entries
from orchestrator.spec.job import JobSpec
from orchestrator.submission.model_process import error_of, store_of

MODULE = "orchestrator.worker.replay.replay_rank"
LOOPBACK = "127.0.0.1"
PATIENCE_S = 3.0  # to wait for the other ranks after one has ended: their faults may be the cause
SHOWN_LINES = 20  # at most, of the output of a process that ended by itself

T = TypeVar("T")


@dataclass(frozen=True)
class Verification:
    """Steps to replay.

    Args:
        records: of the steps, as the run did them.
        worlds: that did them.
        workers: world size of the replay.
        checkpoint: before the first of the steps; None for the beginning.
        numerics: fingerprint of the run's first worker, on which the bits depend; None where that isn't known.
        differing: workers of `worlds` whose numerics differ from that one's, and in what.
    """

    run_id: str
    run_dir: Path
    job: JobSpec
    records: tuple[StepRecord, ...]
    worlds: tuple[PastWorld, ...]
    workers: int
    checkpoint: Path | None
    store_dir: str
    numerics: Mapping[str, Any] | None
    differing: Mapping[str, Differences]


def what_to_verify(
    run_id: str, run_dir: Path, after: int | None = None, steps: int = 20, workers: int | None = None
) -> Verification:
    """Choose at most `steps` steps after a checkpoint.

    Args:
        after: the checkpoint's step, -1 for the run's beginning; None for the newest checkpoint with steps after it, or
            else the beginning.
        workers: None for another world size than those of the steps.

    Raises:
        UsageError: training is not exact, or there are no such steps.
        NotFound: there is no such checkpoint.
        CheckpointCorrupt: its files are missing or changed.
        DataError: the token store is gone.
    """
    job = JobSpec.model_validate_json((run_dir / "job.json").read_text())
    if not job.train.is_exact:
        raise UsageError(
            f"train.determinism of run {run_id} is {job.train.determinism}: repeating its steps may give other bits",
            remedy="Verify runs of jobs with train.determinism: exact.",
        )
    entries = read_entries(run_dir)
    committed = committed_steps(entries)
    if not committed:
        raise NotFinished(f"run {run_id} has no committed step yet", remedy="Verify it once it has trained.")
    newest = committed[-1].step
    if after is None:
        after = max((step for step in list_steps(run_dir / "checkpoints") if step < newest), default=-1)
    elif after >= newest:
        raise UsageError(f"run {run_id} has no step after {after}; its newest committed one is {newest}")
    checkpoint = choose(run_dir / "checkpoints", after) if after >= 0 else None
    decided = [e.event.first_step for e in entries if isinstance(e.event, StageDecided) and e.event.first_step > after]
    last = min([after + steps, *(first_step - 1 for first_step in decided)])
    records = tuple(record for record in committed if after < record.step <= last)
    worlds = past_worlds(entries, records)
    if other := [
        past.first_step for past in worlds if past.micro_batch != worlds[0].micro_batch
    ]:  # changed after an out-of-memory failure
        records = tuple(record for record in records if record.step < other[0])
        worlds = past_worlds(entries, records)
    if not records:
        raise UsageError(
            f"step {after + 1} of run {run_id} began a stage of its curriculum by a request, which its checkpoint of "
            f"step {after} doesn't know of",
            remedy="Name another checkpoint: --from STEP.",
        )
    sizes = {record.world_size for record in records}
    return Verification(
        run_id=run_id,
        run_dir=run_dir,
        job=job,
        records=records,
        worlds=worlds,
        workers=workers or next(size for size in (1, 2, 3) if size not in sizes or sizes >= {1, 2, 3}),
        checkpoint=checkpoint,
        store_dir=store_of(run_id, run_dir),
        numerics=next((e.event.fingerprint for e in entries if isinstance(e.event, NumericsRecorded)), None),
        differing=differing_workers(entries, worlds),
    )


def differing_workers(entries: Sequence[JournalEntry], worlds: Sequence[PastWorld]) -> dict[str, Differences]:
    """Workers of these worlds whose numerics differed from the run's first worker's."""
    members = {worker for past in worlds for worker in past.world.members}
    differing = (entry.event for entry in entries if isinstance(entry.event, NumericsDiffer))
    return {event.worker: event.differs for event in differing if event.worker in members}


def past_worlds(entries: Sequence[JournalEntry], records: Sequence[StepRecord]) -> tuple[PastWorld, ...]:
    """The worlds that did these steps, from the decisions in the journal."""
    decisions = (entry.event.state.current for entry in entries if isinstance(entry.event, StateDecided))
    plans = {plan.generation: plan for plan in decisions if plan is not None}
    worlds: list[PastWorld] = []
    for record in records:
        if not worlds or worlds[-1].world.generation != record.generation:
            plan = plans[record.generation]
            worlds.append(PastWorld(record.step, plan.world, plan.placement, plan.micro_batch))
    return tuple(worlds)


def done_again(order: Verification) -> Iterator[Numerics | StepRecord]:
    """Yield the numerics of this machine, then each replayed step. The processes end with the iterator.

    Raises:
        OrchestratorError: the error of one of them.
    """
    plan = _plan(order)
    with ExitStack() as stack:
        ranks = [stack.enter_context(_Rank(order, worker, n)) for n, worker in enumerate(plan.world.members)]
        try:
            ranks[0].tell(plan)
            plan = replace(plan, store_address=ranks[0].answer(StoreAddress))
            for rank in ranks[1:]:
                rank.tell(plan)
            yield ranks[0].answer(Numerics)
            for _ in order.records:
                yield ranks[0].answer(StepRecord)
        except _Ended as ended:
            raise _cause([ended, *(rank.end(PATIENCE_S) for rank in ranks if rank is not ended.rank)]) from None


def _plan(order: Verification) -> GenerationPlan:
    world = World(order.worlds[-1].world.generation, tuple(f"v{rank}" for rank in range(order.workers)))
    first = order.records[0].step
    return GenerationPlan(
        term=0,
        world=world,
        placement=ExpertPlacement.balanced(order.job.model.n_routed_experts, world.size),
        source=None,
        store_prefix="verify",
        store_address=StoreAddress(LOOPBACK, 0),
        restore=Restore(first - 1, str(order.checkpoint)) if order.checkpoint is not None else None,
        micro_batch=order.worlds[0].micro_batch,
        skips=tuple(record.step for record in order.records if record.skipped),
        replayed=order.worlds,
    )


class _Ended(Exception):
    """A rank's process has ended, or is about to.

    Args:
        fault: that it reported last.
        code: its exit code; None while it lives.
        said: the end of its output beside the answers.
    """

    def __init__(self, rank: "_Rank", fault: Fault | None, code: int | None, said: str) -> None:
        self.rank, self.fault, self.code, self.said = rank, fault, code, said


def _cause(ends: Sequence[_Ended]) -> OrchestratorError:
    """The cause of a failed replay from the ends of its ranks, in order of detection: a rank's own fault comes first,
    then a sudden end, then lost peers."""
    for end in ends:
        if end.fault is not None and end.fault.kind != PEER_LOST:
            return error_of(end.fault)
    for end in ends:
        if end.code:
            return OrchestratorError(f"the process of rank {end.rank.worker} ended by itself ({end.code}):\n{end.said}")
    first = ends[0]
    reason = first.fault.message if first.fault is not None else "ended without an error message"
    return OrchestratorError(f"rank {first.rank.worker} of the replay: {reason}")


class _Rank:
    """The process of one rank. Its answers have a pipe of their own, apart from what models print."""

    def __init__(self, order: Verification, worker: str, number: int) -> None:
        self.worker, self._order = worker, order
        resources = order.job.resources
        threads = max(1, int(resources.cpus))
        self._job = WorkerJob(
            run_id=order.run_id,
            job_json=order.job.model_dump_json(by_alias=True),
            store_dir=order.store_dir,
            storage_dir=str(order.run_dir),
            head_host=LOOPBACK,
            threads=threads,
        )
        env = WORKER_ENV | dict(order.job.envs) | EXACT_ENV | {"OMP_NUM_THREADS": str(threads)}
        env |= (
            (NCCL_ENV | {"CUDA_VISIBLE_DEVICES": _device(number)}) if resources.num_gpus else {"DS_ACCELERATOR": "cpu"}
        )
        with ExitStack() as opened:
            self._said: IO[str] = opened.enter_context(tempfile.TemporaryFile("w+"))
            reading, writing = os.pipe()
            self._answers: IO[str] = opened.enter_context(os.fdopen(reading))
            with os.fdopen(writing, "w"):
                self._process = subprocess.Popen(
                    [sys.executable, "-m", MODULE, str(writing)],
                    stdin=subprocess.PIPE,
                    stdout=self._said,
                    stderr=self._said,
                    text=True,
                    pass_fds=[writing],
                    start_new_session=True,  # Ctrl-C goes to this process only, which ends the child
                    env=os.environ | env,
                )
            self._open = opened.pop_all()

    def tell(self, plan: GenerationPlan) -> None:
        """Send the plan. Raises _Ended."""
        assert self._process.stdin is not None
        order = ReplayOrder(self.worker, self._job, plan, self._order.records[-1].step)
        try:
            with self._process.stdin as stdin:
                stdin.write(REPLAY_LINES.write(order) + "\n")
        except OSError:
            raise self.end(PATIENCE_S) from None

    def answer(self, kind: type[T]) -> T:
        """Its next answer of this kind. Raises _Ended if none comes."""
        for line in self._answers:
            answer = REPLAY_LINES.read(line)
            if isinstance(answer, kind):
                return answer
            if isinstance(answer, Fault):
                raise _Ended(self, answer, None, "")
        raise self.end(PATIENCE_S)

    def end(self, patience_s: float) -> _Ended:
        """How it ended, if it does within `patience_s` of another one's end."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(patience_s)
        if self._process.poll() is None:
            return _Ended(self, None, None, "")
        faults = [answer for line in self._answers if isinstance(answer := REPLAY_LINES.read(line), Fault)]
        self._said.seek(0)
        output = "\n".join(self._said.read().splitlines()[-SHOWN_LINES:])
        return _Ended(self, faults[-1] if faults else None, self._process.returncode, output)

    def __enter__(self) -> "_Rank":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        with suppress(OSError):  # the reader has ended before all was written
            self._process.stdin.close()  # type: ignore[union-attr]
        self._open.close()


def _device(number: int) -> str:
    """The GPU of a rank, among those that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return str(number) if visible is None else "".join(visible.split(",")[number : number + 1])


def numerics_here(numerics: Numerics) -> dict[str, Any]:
    """A fingerprint in the journal's form."""
    found: dict[str, Any] = json.loads(numerics.fingerprint)
    return found
