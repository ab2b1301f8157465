"""Phase of a worker, in its reports and in the status of its run."""

from enum import StrEnum


class Phase(StrEnum):
    """Phase of a worker."""

    COLD = "cold"
    WARMING = "warming"
    STANDBY = "standby"  # warm, holds no shard
    TRAINING = "training"
    MOVING = "moving"  # past a fence: transfer and rebuild
    READY = "ready"  # holds its shard of the next generation, waits for activation
    STRANDED = "stranded"  # its generation or the transition from it failed; holds state, waits for a plan
    FINISHED = "finished"  # the last step is done; the final checkpoint is written
    FAILED = "failed"
