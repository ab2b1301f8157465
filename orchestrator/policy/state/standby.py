"""How many workers a run holds, members and standbys together."""

from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.world_size import Wish, wanted_size
from orchestrator.protocol.scaling import UNLIMITED, Grant


def workers_to_hold(limits: RunLimits, wish: Wish | None, step: int, grant: Grant = UNLIMITED) -> int:
    """Workers that should exist, warm or getting warm, while `step` is being done.

    The wanted size and the job's standbys; or the largest size still to come by schedule, if that is more, since
    workers must be warm when its step comes. None beyond what the Scheduler grants.
    """
    coming = max((entry.workers for entry in limits.schedule if entry.at_step > step), default=0)
    wanted = wanted_size(limits, wish, step) + limits.standby
    return grant.of(min(max(wanted, coming), limits.max_workers + limits.standby))
