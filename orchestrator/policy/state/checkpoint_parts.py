"""Checkpoints of which parts are written, and that are not complete."""

from orchestrator.policy.state.run_state import Commit, Observation, RunState
from orchestrator.protocol.worker_report import ShardWritten


def complete_checkpoints(state: RunState, seen: Observation) -> list[Commit]:
    """Checkpoints of the current and previous generation with the shards of all ranks written, oldest first, but those
    that were abandoned."""
    plans = {plan.generation: plan for plan in (state.previous, state.current) if plan}
    shards: dict[tuple[int, int], dict[int, ShardWritten]] = {}
    current = state.current.generation if state.current else -1
    of_gone = (shard for report in seen.gone.values() for shard in report.shards if shard.generation == current)
    for shard in (*of_gone, *(shard for report in seen.reports.values() for shard in report.shards)):
        written = (shard.generation, shard.step)
        if written > state.checkpoint and written not in seen.abandoned and shard.generation in plans:
            shards.setdefault((shard.step, shard.generation), {})[shard.rank] = shard
    return [
        Commit(step, plans[generation].term, generation, tuple(by_rank[rank] for rank in sorted(by_rank)))
        for (step, generation), by_rank in sorted(shards.items())
        if sorted(by_rank) == list(range(plans[generation].world.size))
    ]


def can_complete(state: RunState, seen: Observation, step: int, term: int, generation: int) -> bool:
    """Whether a checkpoint of which some parts may be written can still be completed. It can't if a rank without a part
    is lost, or has gone on to a later checkpoint. Generations that were planned later than this state can."""
    if generation >= state.num_generations:
        return True
    plans = (state.previous, state.current, state.next)
    plan = next((plan for plan in plans if plan and (plan.term, plan.generation) == (term, generation)), None)
    if plan is None or (generation, step) <= state.checkpoint:
        return False
    for worker in plan.world.members:
        report = seen.reports.get(worker) or seen.gone.get(worker)
        written = [(s.generation, s.step) for s in report.shards] if report else []
        is_gone = worker in seen.lost or worker not in state.worker_group
        if (generation, step) not in written and (is_gone or max(written, default=(-1, -1)) > (generation, step)):
            return False
    return True
