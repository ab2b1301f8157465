"""Committed steps from the newest backwards, and the progress of a run that goes back to one.

A long journal isn't read whole for them.
"""

from collections.abc import Iterator

from orchestrator.policy.state.load_average import LoadAverage
from orchestrator.policy.state.progress import RECENT_STEPS, Progress
from orchestrator.protocol.events.reading import entry_of
from orchestrator.protocol.events.run import Resumed
from orchestrator.protocol.events.training import StepsCommitted
from orchestrator.protocol.step_record import StepRecord, without_loads
from orchestrator.storage.chain_reader import ChainReader
from orchestrator.storage.objects import Objects


def progress_up_to(objects: Objects, progress: Progress, step: int, before: int | None = None) -> Progress:
    """Progress without the steps after this one.

    Args:
        objects: the run's, in run storage.
        progress: by its journal.
        before: read only events with a `seq` below; None for all.
    """
    if step >= progress.watermark:
        return progress
    if step < 0:
        return Progress()
    undone: list[StepRecord] = []
    recent: list[StepRecord] = []
    for record in committed_backwards(objects, progress.watermark, before):
        if len(recent) == RECENT_STEPS:
            break
        (undone if record.step > step else recent).append(record)
    recent.reverse()
    validations = tuple((at, loss) for at, loss in progress.validations if at <= step)
    return Progress(
        watermark=step,
        recent=tuple(map(without_loads, recent)),
        first_loss=progress.first_loss,
        loss=recent[-1].loss,
        first_validation_loss=validations[0][1] if validations else None,
        validation_loss=validations[-1][1] if validations else None,
        tokens=progress.tokens - sum(record.batch.tokens for record in undone),
        skipped=progress.skipped - sum(not record.update.applied for record in undone),
        validations=validations,
        validation_metrics=next((r.validation_metrics for r in reversed(recent) if r.validation_loss is not None), {}),
        loads=LoadAverage().after((record.step, record.routing.loads) for record in recent),
        saliency=tuple((at, averages) for at, averages in progress.saliency if at <= step),
        stages=tuple((name, first_step) for name, first_step in progress.stages if first_step <= step),
    )


def committed_backwards(objects: Objects, watermark: int, before: int | None = None) -> Iterator[StepRecord]:
    """Records of committed steps up to the watermark, the newest first, each step once.

    Args:
        before: read only events with a `seq` below; None for all.
    """
    above = watermark + 1
    for entry in ChainReader(objects).backwards():
        if above == 0:
            return
        for plain in reversed(entry.events):
            is_ledger = plain["kind"] in (StepsCommitted.kind, Resumed.kind)
            if not is_ledger or (before is not None and plain["seq"] >= before):
                continue
            match entry_of(plain).event:
                case StepsCommitted(records):
                    for record in reversed(records):
                        if record.step < above:
                            above = record.step
                            yield record
                case Resumed(step=step):
                    above = min(above, step + 1)
