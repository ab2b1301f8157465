"""How long before its step a scheduled change is prepared."""

import math

from orchestrator.policy.state.progress import typical_step_s
from orchestrator.policy.state.run_state import Observation

HORIZON_S = 3.0  # a scheduled change is prepared this long before its step, and at least HORIZON_STEPS
HORIZON_STEPS = 8


def horizon_steps(seen: Observation) -> int:
    """Steps before a scheduled change, from which on it is prepared."""
    step_s = typical_step_s(seen.progress)
    return max(HORIZON_STEPS, math.ceil(HORIZON_S / step_s)) if step_s else HORIZON_STEPS
