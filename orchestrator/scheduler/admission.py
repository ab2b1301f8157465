"""Admission checks at submission and on resume: the run's name, its checkpoint, and room in the cluster."""

import logging
import time
from collections.abc import Mapping
from types import MappingProxyType

from orchestrator.checkpoint.read import read_manifest
from orchestrator.cluster.cluster_objects import cluster_id
from orchestrator.cluster.nodes import free_on_nodes, labels_of_nodes, may_grow, whole_nodes
from orchestrator.errors import JobDoesNotFit, NameTaken, UsageError
from orchestrator.policy.cluster.autoscaling import bounds
from orchestrator.policy.cluster.capacity import places
from orchestrator.policy.cluster.gpu_kinds import check_alike, kinds_of
from orchestrator.policy.cluster.node_pools import Labels, check_pool, pool_of, shown
from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.world_size import wanted_size
from orchestrator.protocol.messages import Restore, ResumeRequest
from orchestrator.protocol.scaling import JUST_COME, ScalingView
from orchestrator.run_records.final_status import has_ended
from orchestrator.run_records.job_files import read_job
from orchestrator.run_records.run_files import holds_run
from orchestrator.run_records.run_history import RunHistory
from orchestrator.scheduler.autoscaler import Autoscaler
from orchestrator.scheduler.controller_client import ControllerClient
from orchestrator.spec.job import JobSpec
from orchestrator.spec.workers import MANUAL
from orchestrator.storage.backends.location import Location, location_of, objects_at
from orchestrator.storage.backends.signed_objects import SigningKey
from orchestrator.storage.backends.signing_keys import run_objects
from orchestrator.storage.chain import Holder
from orchestrator.storage.chain_reader import newest_holder
from orchestrator.storage.journal_age import LIVELY_S, journal_age_s

log = logging.getLogger("orchestrator.control")

SETTLE_S = 3.0  # until the resources of an ended run count as free


def refuse_taken(run_id: str, directory: Location) -> None:
    """Raise NameTaken if the cluster or the storage has a run of this name."""
    remedy = "Choose another name, or move that run's directory away."
    is_over = has_ended(directory)  # its controller may be about to exit
    if ControllerClient(run_id).find() is not None and not is_over:
        raise NameTaken(f"a run {run_id} is active", remedy=remedy, unchanged="Nothing was started.")
    if holds_run(directory):
        raise NameTaken(f"{directory} holds a run {run_id}", remedy=remedy, unchanged="Nothing was started.")


def with_gpus(job: JobSpec) -> JobSpec:
    """The job with a number for `resources.gpus: auto`, by the nodes that its workers may run on. Raises UsageError if
    it is exact and these have GPUs of several kinds."""
    nodes = whole_nodes(job.workers.label_selector)
    on_nodes = (node.get("GPU", 0.0) for node in nodes)
    job = job.model_copy(update={"resources": job.resources.on_nodes(job.workers.min, on_nodes)})
    check_gpus(job)
    return job


def check_gpus(job: JobSpec) -> None:
    """Log a warning if the nodes that workers may run on have GPUs of several kinds. Raises UsageError if the job is
    exact."""
    kinds = kinds_of(whole_nodes(job.workers.label_selector)) if job.resources.num_gpus else {}
    if warning := check_alike(kinds, job.train.is_exact):
        log.warning("%s: %s", job.name, warning)


def newcomer(
    limits: RunLimits,
    job: JobSpec,
    wanted: int,
    stage: str = "",
    by_hand: bool = False,
    priority: int | None = None,
) -> ScalingView:
    """View of a run that enters the queue now, used by the Scheduler until its controller reports.

    Args:
        wanted: number of workers; `by_hand` if a user has just requested it.
        stage: of the curriculum in which it begins; empty for the first one.
        priority: requested for the run earlier; None for the job's.
    """
    now_s = time.time()
    least, _ = bounds(limits, stage)
    if by_hand:
        least = min(least, wanted)
    return ScalingView(
        limits.run_id,
        MANUAL,
        job.resources.request,
        wanted,
        least,
        wanted,
        has_begun=False,
        priority=limits.priority_of(priority),
        submitted_s=now_s,
        grant=JUST_COME,
        queued_s=now_s,
        selector=job.workers.label_selector,
    )


def resumed_run(
    run_id: str, directory: Location, order: ResumeRequest, take_over: bool, key: SigningKey | None
) -> tuple[RunLimits, ScalingView]:
    """Limits and view of a run that is to be resumed now. Raises what `Scheduler.resume` does, except JobDoesNotFit."""
    if ControllerClient(run_id).find() is not None:
        raise UsageError(
            f"run {run_id} is active",
            remedy="To go back to a checkpoint, pause or stop it first.",
            unchanged="Nothing was changed.",
        )
    records = run_objects(directory, key=key)
    if not take_over:
        _refuse_of_another_cluster(run_id, directory, newest_holder(records))
    job = read_job(directory)
    check_gpus(job)
    limits = RunLimits.of(run_id, job)
    done = order.restore.step + 1 if order.restore else 0
    if done >= limits.steps:
        raise UsageError(
            f"run {run_id} has done all its {limits.steps} steps",
            remedy="Resume from an earlier checkpoint with --step, or submit a new run.",
            unchanged="Nothing was started.",
        )
    check_residuals(order.restore, job)
    if order.workers is not None:
        limits.check_size(order.workers)
    memory = RunHistory(directory, limits, objects=records)
    read_job(directory, memory.job_sha256, records)
    workers = order.workers or wanted_size(limits, memory.state.size_request, done)
    stage, is_by_hand = memory.progress.stage, order.workers is not None
    return limits, newcomer(limits, job, workers, stage, is_by_hand, memory.state.priority)


def _refuse_of_another_cluster(run_id: str, directory: Location, holder: Holder) -> None:
    """Raise UsageError for a run that has not ended, if another cluster has written its journal recently."""
    if holder.cluster == cluster_id() or has_ended(directory):
        return
    if (age_s := journal_age_s(objects_at(directory))) > LIVELY_S:
        return
    raise UsageError(
        f"run {run_id} may be active in another cluster: {holder.process} wrote its journal {age_s:.0f} s ago",
        remedy=f"If that cluster is gone, resume it with --take-over, or {LIVELY_S:.0f} s after its last entry. If "
        "it is not, it ends its workers of the run that is taken over.",
        unchanged="Nothing was started.",
    )


def check_admissible(run: ScalingView, now: Autoscaler | None = None) -> None:
    """Raise JobDoesNotFit for a run whose minimum of workers could never fit, or has no room now.

    Args:
        now: the autoscaler, which knows the other runs' workers and requests; None if the run may wait.
    """
    run_id, request, least = run.run_id, run.request, run.least
    selector, labels = run.selector, labels_of_nodes()
    whole = whole_nodes(selector)
    if places(whole, request) < least and not may_grow():
        check_pool(selector, labels)
        raise JobDoesNotFit(
            f"{least} worker{'s' * (least > 1)} of {_amounts(request)} is the least that {run_id} may have; "
            f"the cluster has room for {places(whole, request)} if nothing else runs: its nodes{_of(selector)} have "
            + "; ".join(_amounts(node) for node in whole),
            remedy="Ask for less, or add nodes to the cluster first.",
            unchanged="Nothing was started.",
        )
    deadline_s = time.monotonic() + SETTLE_S
    while now is not None and not (share := now.share_of(run)).places:
        if time.monotonic() > deadline_s:
            free = list(free_on_nodes(pool_of(selector, labels)).values())
            raise JobDoesNotFit(
                f"{run_id}, whose workers take {_amounts(request)}, would have to wait: {share.grant.why}; free are "
                + "; ".join(_amounts(node, request) for node in free),
                remedy="Omit --timeout to let it wait in the queue, raise its priority, or request less.",
                unchanged="Nothing was started.",
            )
        time.sleep(0.2)


def _amounts(resources: Mapping[str, float], asked: Mapping[str, float] = MappingProxyType({})) -> str:
    """The amounts in words; none of what is asked for is worth a word too."""
    named = [name for name in ("CPU", "GPU") if resources.get(name) or asked.get(name)]
    parts = [f"{resources.get(name, 0.0):g} {name}" for name in named]
    if resources.get("memory"):
        parts.append(f"{resources['memory'] / 2**30:.1f} GiB memory")
    return ", ".join(parts) or "nothing"


def _of(selector: Labels) -> str:
    return f" of {shown(selector)}" if selector else ""


def check_residuals(restore: Restore | None, job: JobSpec) -> None:
    """Raise UsageError if the job's compression can't continue from the residuals in the checkpoint."""
    if restore is None or restore.reset_residuals:
        return
    saved = str(read_manifest(location_of(restore.path)).meta.get("compression", ""))
    wanted = job.communication.compression.keeps
    if saved != wanted:
        raise UsageError(
            f"{restore.path} was written by a run that kept {saved or 'nothing'} of its gradients; the job would keep "
            f"{wanted or 'nothing'}",
            remedy="Resume with the compression that it was trained with, or with --reset-residuals, which drops the "
            "values not sent yet.",
            unchanged="Nothing was started.",
        )
