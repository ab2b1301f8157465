"""What the Scheduler hears of a run to decide how many workers it is to have, and what it grants it."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Grant:
    """How many workers a run may hold, standbys included, whatever is wanted; None for as many as are. With 0 it waits
    in the queue and holds nobody."""

    workers: int | None
    why: str = ""

    def of(self, workers: int) -> int:
        """As many of these as are granted."""
        return workers if self.workers is None else min(workers, self.workers)


UNLIMITED = Grant(None)
JUST_COME = Grant(0, "it has only just come")


@dataclass(frozen=True)
class ScalingView:
    """A run, as far as its size goes. It may have `least` to `most` workers now, by its job and its present stage.

    `request` is what Ray reserves for each worker, `wanted` the size that it is to have, with `standby` more kept warm;
    of both it holds what the `grant` allows. It has begun once it has a world; it is steady if so many train and
    nothing is about to change, pinned if its user has asked for this size or it is about to end, and it rests for a
    while after it was made larger. `speeds` are target tokens per second by world size, of the present stage's newest
    steps, `stall_s` what a rescale costs, and `left_s` how long the rest takes at the present speed. `selector`
    says what labels of a node must be for its workers to live there, and `avoid` names nodes on which it puts nobody
    new, whatever their labels.

    Times are `time.time()` seconds: `queued_s` is since when it waits in the queue, None if it does not, `admitted_s`
    when it was let out of it last, and `begun_s` when it first had a world then.
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
        """What it holds if it is granted all that is wanted."""
        return self.wanted + self.standby
