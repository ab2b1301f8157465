"""Check of workers' memory: a rank's state, its snapshots, and those that it keeps for another rank; on a GPU what
trains there."""

import math
from dataclasses import replace

from orchestrator.errors import UsageError
from orchestrator.policy.cluster.gpu_kinds import LABEL, largest_memory
from orchestrator.policy.estimate.job_plan import JobPlan, WorldPlan
from orchestrator.policy.estimate.worker_memory import MemoryPlan
from orchestrator.spec.job import JobSpec

GIB = 2**30


def is_checked(job: JobSpec) -> bool:
    """Whether `check_memory` has something to compare with."""
    return job.resources.memory is not None or _gpu(job) is not None


def _gpu(job: JobSpec) -> tuple[str, int] | None:
    """Kind and bytes of the largest GPU that a worker may get, where the job names kinds."""
    return None if job.resources.gpus == 0 else largest_memory(job.workers.label_selector)


def check_memory(job: JobSpec, plan: JobPlan) -> None:
    """Compare every planned world with `resources.memory`, and with the memory of the GPUs that the job's
    `workers.label_selector` names. A job that sets neither passes.

    Raises:
        UsageError: in some world a worker needs more.
    """
    _check_gpu(job, plan)
    given = job.resources.memory_bytes
    short = [world for world in plan.worlds if given is not None and world.memory.peak > given]
    if not short:
        return
    assert given is not None
    worst = max(short, key=lambda world: world.memory.peak)
    raise UsageError(
        f"resources.memory is {job.resources.memory} ({_amount(given)}), and a worker of {job.name} needs "
        f"{_amount(worst.memory.peak)} in a world of {worst.world_size}, as far as is known before it runs: "
        f"{_parts(worst.memory)}",
        remedy=_remedy(plan, worst, given),
        unchanged="Nothing was started.",
    )


def _check_gpu(job: JobSpec, plan: JobPlan) -> None:
    """Activations are estimates, and may be recomputed or of fewer rows; the rest has to fit."""
    worst, gpu = max(plan.worlds, key=lambda world: world.memory.engine), _gpu(job)
    needed = worst.memory.engine + worst.memory.teacher
    if gpu is None or needed <= gpu[1]:
        return
    raise UsageError(
        f"workers.label_selector {LABEL} admits GPUs of {_amount(gpu[1])} at most ({gpu[0]}), and a worker of "
        f"{job.name} needs {_amount(needed)} for weights, optimizer state and gradients "
        f"{'and its teacher ' if worst.memory.teacher else ''}in a world of {worst.world_size}",
        remedy="Set workers.min to more, which share the state, or admit larger GPUs.",
        unchanged="Nothing was started.",
    )


def crowding(job: JobSpec, plan: JobPlan, node_bytes: int) -> str:
    """A warning that all workers together need more than a node of `node_bytes` has. Empty if they don't, or if
    `resources.memory` limits how many Ray places on a node."""
    if job.resources.memory is not None:
        return ""
    needed = {world.world_size: world.world_size * world.memory.peak for world in plan.worlds}
    size = max(needed, key=lambda size: needed[size])
    if needed[size] <= node_bytes:
        return ""
    workers = "a worker needs" if size == 1 else f"{size} workers need"
    return (
        f"{workers} {_amount(needed[size])}, and this machine has {_amount(node_bytes)}: one such node is too small. "
        "With resources.memory Ray places no more workers on a node than fit."
    )


def _parts(memory: MemoryPlan) -> str:
    """Parts of the peak. Gradients, activations and loss are freed where a second shard is held."""
    state = {part: getattr(memory, part) for part in ("weights", "masters", "moments", "buffers")}
    if memory.at_fence == memory.heap:
        rest = {"a second shard at a fence": memory.fence}
    else:
        rest = {part: getattr(memory, part) for part in ("gradients", "activations", "loss")}
    rest |= {
        "the first snapshots of a second world": memory.first_snapshots,
        "its own snapshots and its protected rank's": memory.snapshots,
        "gradients of the steps between two of them": memory.deltas,
    }
    parts = state | rest | {"teacher": memory.teacher, "process": memory.process}
    return ", ".join(f"{part} {_amount(num_bytes)}" for part, num_bytes in parts.items() if num_bytes)


def _remedy(plan: JobPlan, worst: WorldPlan, given: int) -> str:
    ways = [f"Set resources.memory to {math.ceil(10 * worst.memory.peak / GIB) / 10:.1f}GiB or more"]
    if worst.memory.deltas:
        ways.append(f"set recovery.whole_every: 1, for {_amount(replace(worst.memory, deltas=0).peak)}")
    if worst.memory.snapshots:
        bare = replace(worst.memory, snapshots=0, deltas=0).peak
        ways.append(f"set protection.every: none, for {_amount(bare)}")
    sizes = [world.world_size for world in plan.worlds if world.memory.peak > given]
    larger = [world for world in plan.worlds if world.world_size > max(sizes)]
    if larger:
        ways.append(f"set workers.min to {larger[0].world_size}, for {_amount(larger[0].memory.peak)}")
    else:
        ways.append("ask for more workers, which share the state")
    return f"{', '.join(ways[:-1])}, or {ways[-1]}."


def _amount(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
