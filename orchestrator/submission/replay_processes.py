"""Processes that replay a run's steps on this machine, one per rank."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TypeVar

from orchestrator.controller.worker_env import env_of_worker
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.world import World
from orchestrator.errors import OrchestratorError
from orchestrator.protocol.child_process import PEER_LOST, REPLAY_LINES, Fault, Numerics, ReplayOrder
from orchestrator.protocol.messages import GenerationPlan, Restore, StoreAddress
from orchestrator.protocol.step_record import StepRecord
from orchestrator.protocol.worker_job import WorkerJob
from orchestrator.spec.job import JobSpec
from orchestrator.submission.verification import Verification
from orchestrator.torch_process import TorchProcess

MODULE = "orchestrator.worker.replay.replay_rank"
LOOPBACK = "127.0.0.1"
PATIENCE_S = 3.0  # to wait for the other ranks after one has ended: their faults may be the cause
T = TypeVar("T")


def done_again(order: Verification) -> Iterator[Numerics | StepRecord]:
    """Yield the numerics of this machine, then each replayed step. The processes end with the iterator.

    Raises:
        OrchestratorError: the error of one of them.
    """
    plan = _plan(order)
    with ExitStack() as stack:
        ranks = [
            _Rank(
                order, worker, stack.enter_context(TorchProcess(MODULE, REPLAY_LINES, _env_of_rank(order.job, number)))
            )
            for number, worker in enumerate(plan.world.members)
        ]
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
        placement=ExpertPlacement.balanced(order.worlds[0].placement.num_experts, world.size),
        source=None,
        store_prefix="verify",
        store_address=StoreAddress(LOOPBACK, 0),
        restore=Restore(first - 1, str(order.checkpoint)) if order.checkpoint is not None else None,
        micro_batch=order.worlds[0].micro_batch,
        skips=tuple(record.step for record in order.records if record.update.skipped),
        replayed=order.worlds,
        change=order.change,
        families=order.worlds[0].families,
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
            return end.fault.error()
    for end in ends:
        if end.code:
            return OrchestratorError(f"the process of rank {end.rank.worker} ended by itself ({end.code}):\n{end.said}")
    first = ends[0]
    reason = first.fault.message if first.fault is not None else "ended without an error message"
    return OrchestratorError(f"rank {first.rank.worker} of the replay: {reason}")


class _Rank:
    """The process of one rank."""

    def __init__(self, order: Verification, worker: str, process: TorchProcess) -> None:
        self.worker, self._order, self._process = worker, order, process
        self._job = WorkerJob(
            run_id=order.run_id,
            job_json=order.job.model_dump_json(by_alias=True),
            store_dir=order.data.store_dir,
            storage_dir=str(order.run_dir),
            head_host=LOOPBACK,
            threads=_threads_of(order.job),
            vocab_size=order.data.vocab_size,
        )

    def tell(self, plan: GenerationPlan) -> None:
        """Send the plan. Raises _Ended."""
        try:
            self._process.send(ReplayOrder(self.worker, self._job, plan, self._order.records[-1].step))
        except OSError:
            raise self.end(PATIENCE_S) from None

    def answer(self, kind: type[T]) -> T:
        """Its next answer of this kind. Raises _Ended if none comes."""
        for answer in self._process.answers():
            if isinstance(answer, kind):
                return answer
            if isinstance(answer, Fault):
                raise _Ended(self, answer, None, "")
        raise self.end(PATIENCE_S)

    def end(self, patience_s: float) -> _Ended:
        """How it ended, if it does within `patience_s` of another one's end."""
        code = self._process.exit_code(patience_s)
        if code is None:
            return _Ended(self, None, None, "")
        faults = [answer for answer in self._process.answers() if isinstance(answer, Fault)]
        return _Ended(self, faults[-1] if faults else None, code, self._process.output())


def _threads_of(job: JobSpec) -> int:
    return max(1, int(job.resources.cpus))


def _env_of_rank(job: JobSpec, number: int) -> dict[str, str]:
    env = env_of_worker(job, _threads_of(job))
    return env | ({"CUDA_VISIBLE_DEVICES": _device(number)} if job.resources.num_gpus else {})


def _device(number: int) -> str:
    """The GPU of a rank, among those that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return str(number) if visible is None else "".join(visible.split(",")[number : number + 1])
