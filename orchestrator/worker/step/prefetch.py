"""The rows of the next step, read in a thread while this one computes.

Which rows a step has is a pure function of order, step and world, so reading ahead changes nothing but when they are
read. At most two steps are in memory: the one in hand and the one ahead.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from orchestrator.sampling.micro_batches import SlotSize
from orchestrator.sampling.sample_order import Order
from orchestrator.worker.step.batches import Feed, StepFeed


@dataclass(frozen=True)
class _Wanted:
    """All that decides what is read: whoever asks for anything else gets nothing that was read ahead."""

    order: Order
    step: int
    rank: int
    world_size: int
    size: SlotSize


class Prefetch:
    """Reads one step ahead of the one that was asked for last. Used by one thread.

    Args:
        feed: what to read from.
        num_steps: of the run; nothing is read beyond.
    """

    def __init__(self, feed: Feed, num_steps: int) -> None:
        self._feed, self._num_steps = feed, num_steps
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rows")
        self._ahead: tuple[_Wanted, Future[StepFeed]] | None = None

    def step(self, step: int, rank: int, world_size: int, size: SlotSize) -> StepFeed:
        """What `Feed.step` returns or raises, without a wait if the step before was asked for in the same world.

        What was read ahead for another world or another order of rows is dropped.
        """
        wanted = _Wanted(self._feed.order, step, rank, world_size, size)
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == wanted:
            rows = ahead[1].result()
        else:
            if ahead is not None:
                ahead[1].cancel()
            rows = self._feed.step(step, rank, world_size, size)
        if step + 1 < self._num_steps:
            following = replace(wanted, step=step + 1)
            self._ahead = (following, self._thread.submit(self._feed.step, step + 1, rank, world_size, size))
        return rows

    def close(self) -> None:
        """End the thread, and drop what it has read. A repeat is harmless."""
        self._ahead = None
        self._thread.shutdown(wait=False, cancel_futures=True)
