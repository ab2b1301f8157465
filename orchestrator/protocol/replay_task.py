"""Steps to do again, alone and for comparison: the worlds that did them first, and what came out."""

from dataclasses import dataclass

from orchestrator.elastic.expert_change import OfLayers
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.world import World
from orchestrator.protocol.step_record import StepRecord
from orchestrator.sampling.micro_batches import UNSAID, MicroBatchSize


@dataclass(frozen=True)
class PastWorld:
    """A world that trained steps, from `first_step` until the next world's first step, with its expert placement,
    their families and the micro-batch size."""

    first_step: int
    world: World
    placement: ExpertPlacement
    micro_batch: MicroBatchSize = UNSAID
    families: OfLayers = ()


@dataclass(frozen=True)
class StepFingerprint:
    """Results that a replayed step must reproduce bit by bit; fields as in `StepRecord`."""

    step: int
    loss: float
    grad_norm: float
    digests: tuple[str, ...]

    @classmethod
    def of(cls, record: StepRecord) -> "StepFingerprint":
        return cls(record.step, record.loss, record.update.grad_norm, record.state.digests)


@dataclass(frozen=True)
class ReplayTask:
    """Request that a standby alone replays steps from `path`, the checkpoint after `step`, up to `last_step`. `worlds`
    trained them first, without the batches of `skips`, with the results `findings`. `number` identifies the check."""

    number: int
    worker: str
    step: int
    path: str
    last_step: int
    worlds: tuple[PastWorld, ...]
    findings: tuple[StepFingerprint, ...] = ()
    skips: tuple[int, ...] = ()
