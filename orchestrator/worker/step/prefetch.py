"""Rows of coming steps, brought by threads while the training thread computes: the next step's are read, and those of
the steps after it fetched to this node, if the token store is in a bucket."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial

from orchestrator.errors import StoreCorrupt
from orchestrator.sampling.micro_batches import MicroBatchSize
from orchestrator.sampling.sample_order import Order
from orchestrator.storage.condition import StorageCondition, StorageTrouble
from orchestrator.worker.step.batches import BatchReader, StepBatches

log = logging.getLogger("orchestrator.worker")

TICK_S = 0.1  # how often a wait for rows looks whether they are still wanted
SLOW_S = 2.0  # a longer wait for rows is reported
AGAIN_S = 1.0  # until rows that storage refuses are tried again
MOST_SPANS, MOST_STEPS = 2048, 64  # fetched ahead; the steps are fewer than `sample_order.KEPT`
FULL_S = 60.0  # until a disk that was full is tried again

WaitForRows = Callable[[StorageTrouble | None], None]  # see `hooks.StepHooks.wait_for_rows`


@dataclass(frozen=True)
class Wanted:
    """Everything that determines what is read: rows read ahead are used only for an equal request."""

    order: Order
    step: int
    rank: int
    world_size: int
    size: MicroBatchSize


class Prefetch:
    """Reads one step ahead of the last request. Used by one thread. Rows that storage refuses are tried again without
    end: no other worker could do the step without them.

    Args:
        feed: reader of all steps.
        num_steps: of the run; nothing is read beyond.
    """

    def __init__(self, feed: BatchReader, num_steps: int) -> None:
        self._feed, self._num_steps = feed, num_steps
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rows")
        self._closed = threading.Event()
        self._ahead: tuple[Wanted, Future[StepBatches]] | None = None
        self._fetching = None if feed.is_local else StepsAhead(feed, num_steps)

    def step(self, step: int, rank: int, world_size: int, size: MicroBatchSize, waits: WaitForRows) -> StepBatches:
        """Same as `BatchReader.step`, without a wait if the step before was requested in the same world.

        Rows read ahead for another world or another sample order are dropped.

        Args:
            waits: called while the rows aren't there; an exception from it ends the wait.
        """
        wanted = Wanted(self._feed.order, step, rank, world_size, size)
        ahead, self._ahead = self._ahead, None
        rows = None
        if ahead is not None and ahead[0] == wanted:
            rows = ahead[1]
        elif ahead is not None:
            ahead[1].cancel()
        read = partial(self._feed.step, step, rank, world_size, size)
        batches = self._awaited(f"the rows of step {step}", read, rows, waits)
        if step + 1 < self._num_steps:
            following = replace(wanted, step=step + 1)
            self._ahead = (following, self._thread.submit(self._feed.step, step + 1, rank, world_size, size))
            if self._fetching is not None:
                self._fetching.follow(wanted)
        return batches

    def validation(self, rank: int, world_size: int, size: MicroBatchSize, waits: WaitForRows) -> StepBatches:
        """Same as `BatchReader.validation`, with a wait as in `step`."""
        read = partial(self._feed.validation, rank, world_size, size)
        return self._awaited("the validation rows", read, None, waits)

    def close(self) -> None:
        """End the threads, and drop what they have read. Idempotent."""
        self._ahead = None
        self._closed.set()
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._fetching is not None:
            self._fetching.close()

    def _awaited(
        self, what: str, read: Callable[[], StepBatches], rows: Future[StepBatches] | None, waits: WaitForRows
    ) -> StepBatches:
        """The result of `read`, in the thread; of `rows` first, where that is under way."""
        began_s, trouble = time.monotonic(), None
        rows = rows or self._thread.submit(read)
        while True:
            wait((rows,), TICK_S)
            if rows.done():
                try:
                    batches = rows.result()
                except OSError as error:
                    if trouble is None:
                        log.warning("%s can't be read now, and are tried again: %s", what, error)
                    trouble = StorageTrouble(StorageCondition.AWAY, f"{what} can't be read: {error.strerror or error}")
                    rows = self._thread.submit(self._again, read)
                else:
                    if trouble is not None:
                        waits(None)
                    return batches
            elif trouble is None and time.monotonic() - began_s > SLOW_S:
                trouble = StorageTrouble(StorageCondition.SLOW, f"{what} have not been read yet")
            waits(trouble)

    def _again(self, read: Callable[[], StepBatches]) -> StepBatches:
        self._closed.wait(AGAIN_S)
        return read()


class StepsAhead:
    """Fetches the tokens of coming steps to this node, in a thread, in the order of the steps. How far depends on how
    many spans of tokens they consist of: each may be in a block of its own.

    Args:
        num_steps: of the run; nothing is fetched beyond.
    """

    def __init__(self, feed: BatchReader, num_steps: int) -> None:
        self._feed, self._num_steps = feed, num_steps
        self._changed = threading.Condition()
        self._newest: Wanted | None = None
        self._is_closed = False
        threading.Thread(target=self._run, name="steps ahead", daemon=True).start()

    def follow(self, newest: Wanted) -> None:
        """Fetch what comes after this step, whose rows are read, in the same world."""
        with self._changed:
            self._newest = newest
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        fetched: deque[tuple[Wanted, int]] = deque()  # steps ahead, with their numbers of spans
        while (wanted := self._next(fetched)) is not None:
            spans = self._feed.spans(wanted.order, wanted.step, wanted.rank, wanted.world_size, wanted.size)
            try:
                pause_s = 0.0 if self._feed.fetch(spans) else FULL_S
            except OSError:
                self._pause(AGAIN_S)
                continue
            except StoreCorrupt:  # raised again where the step reads it
                pause_s = 0.0
            fetched.append((wanted, len(spans.start)))
            self._pause(pause_s)

    def _next(self, fetched: deque[tuple[Wanted, int]]) -> Wanted | None:
        """The next step to fetch, once there is one; None when this is closed. Steps that need no fetching any more are
        dropped from `fetched`."""
        with self._changed:
            while not self._is_closed:
                newest = self._newest
                if newest is not None:
                    while fetched and (fetched[0][0].step <= newest.step or not _alike(fetched[0][0], newest)):
                        fetched.popleft()
                    step = (fetched[-1][0] if fetched else newest).step + 1
                    spans_ahead = sum(num_spans for _, num_spans in fetched)
                    if step < min(self._num_steps, newest.step + MOST_STEPS) and spans_ahead < MOST_SPANS:
                        return replace(newest, step=step)
                self._changed.wait()
            return None

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed, seconds)


def _alike(one: Wanted, other: Wanted) -> bool:
    """Whether they are steps of the same world and order."""
    return replace(one, step=other.step) == other
