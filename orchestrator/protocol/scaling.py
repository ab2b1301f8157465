"""Values between a run and the Scheduler: the run's state for scaling decisions, and the grant of workers."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Grant:
    """Limit on the workers of a run, standbys included; None for no limit. A run with 0 is queued and holds no
    workers."""

    workers: int | None
    why: str = ""

    def of(self, workers: int) -> int:
        """The granted number out of `workers`."""
        return workers if self.workers is None else min(workers, self.workers)


UNLIMITED = Grant(None)
JUST_COME = Grant(0, "not yet considered by the scheduler")


@dataclass(frozen=True)
class ScalingView:
    """State of a run that matters for its size. Times are `time.time()` seconds.

    Args:
        request: resources that Ray reserves for each worker.
        wanted, standby: target world size; workers kept warm beside it. The run holds as many as `grant` allows.
        least, most: workers that its job and present stage allow.
        is_steady: the wanted number of workers trains and no change is pending.
        has_begun: it has a world.
        is_pinned: its user requested this size, or it is about to end.
        rests: it was enlarged a short time ago.
        speeds: target tokens per second by world size, from the present stage's newest steps.
        stall_s, left_s: cost of a rescale; remaining time at the present speed.
        avoid: nodes that get no new workers of the run, whatever their labels.
        selector: node labels that its workers require.
        queued_s: when the run was queued; None if it isn't.
        admitted_s, begun_s: when it was last admitted; when it first had a world after that.
    """

    run_id: str
    policy: str
    request: Mapping[str, float]
    wanted: int
    least: int
    most: int
    standby: int = 0
    min_gain: float = 0.5
    is_steady: bool = False
    has_begun: bool = True
    is_pinned: bool = False
    rests: bool = False
    speeds: Mapping[int, float] = field(default_factory=dict)
    stall_s: float = 0.0
    left_s: float | None = None
    avoid: tuple[str, ...] = ()
    selector: Mapping[str, str] = field(default_factory=dict)
    priority: int = 0
    submitted_s: float = 0.0
    grant: Grant = UNLIMITED
    queued_s: float | None = None
    admitted_s: float | None = None
    begun_s: float | None = None

    @property
    def full(self) -> int:
        """Number of workers that it holds without a limit."""
        return self.wanted + self.standby
