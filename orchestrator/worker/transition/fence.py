"""Announcement of a fence to newcomers, through the rendezvous store: the training progress there."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.protocol.codec import from_plain, to_plain
from orchestrator.protocol.step_record import StepRecord, without_loads
from orchestrator.worker.shard.shard import TrainingProgress
from orchestrator.worker.transition.prepared_transition import PreparedTransition

ASK_AGAIN_S = 0.01


@dataclass(frozen=True)
class FenceState:
    """Training progress at a fence, and records of steps up to it that the controller may not have."""

    progress: TrainingProgress
    records: tuple[StepRecord, ...]


def announce(
    prepared: PreparedTransition, progress: TrainingProgress, records: Sequence[StepRecord], journalled: int
) -> None:
    """Publish to newcomers that the fence is reached, and the progress. All wait for that, so it has to be short:
    to convert a record takes a tenth of a millisecond, for the sender and for each newcomer.

    Args:
        journalled: a step up to which the controller has the records. Later ones are sent, in case only newcomers are
            left to report them, and that of the state's step, by which the state is verified.

    Raises:
        RuntimeError: the store failed.
    """
    first = min(journalled + 1, progress.step)
    sent = [to_plain(without_loads(record)) for record in records if record.step >= first]
    message = {"progress": progress.to_json(), "records": sent}
    prepared.store.set(prepared.plan.store_prefix + "/fence", json.dumps(message))


def announced(prepared: PreparedTransition, timeout_s: float) -> FenceState | None:
    """The state announced at the fence; None if it isn't reached within `timeout_s`. Raises RuntimeError if the store
    failed."""
    store, key = prepared.store, prepared.plan.store_prefix + "/fence"
    deadline = time.monotonic() + timeout_s
    while not store.check([key]):  # polled, since a wait that times out logs an error each time
        if time.monotonic() > deadline:
            return None
        time.sleep(ASK_AGAIN_S)
    message = json.loads(store.get(key))
    records = tuple(from_plain(StepRecord, plain) for plain in message["records"])
    return FenceState(TrainingProgress.from_json(message["progress"]), records)
