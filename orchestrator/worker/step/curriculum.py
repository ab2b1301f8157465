"""Agreement of all members on decided curriculum stages while the run trains.

A decision comes with a directive, which reaches each member at its own time. All begin to follow it after the same
vote: the first in which every member names it. The rows of the next step may have been read by then, so a change of
that step comes too late, for all members alike, and is left out.
"""

import logging
from dataclasses import replace

from orchestrator.errors import DataError
from orchestrator.protocol.messages import Directive
from orchestrator.worker.shard.shard import TrainingProgress
from orchestrator.worker.step.batches import BatchReader
from orchestrator.worker.step.vote import VoteResult

log = logging.getLogger("orchestrator.worker")


class Stages:
    """Keeps the reader and the training progress at the same sample order. Used by the training thread."""

    def __init__(self, feed: BatchReader) -> None:
        self._feed = feed
        self._proposed = Directive(term=-1, seq=-1)
        self._agreed = 0  # version of the newest decision that was agreed on

    def propose(self, directive: Directive) -> int:
        """The version of the stages that this worker names in its vote."""
        self._proposed = directive
        return directive.stages_version

    def agree(self, outcome: VoteResult, progress: TrainingProgress) -> TrainingProgress:
        """The progress after a vote, with the stages agreed on in it."""
        stages, version = self._proposed.stages, self._proposed.stages_version
        if version != outcome.stages or version == self._agreed:
            return progress
        self._agreed = version
        try:
            self._feed.decide(stages, first_step=progress.step + 2)
        except (ValueError, DataError) as error:  # the same on all members
            log.warning("stages %s can't be followed: %s", stages, error)
        return replace(progress, sampler=self._feed.order.to_json())

    def follow(self, progress: TrainingProgress) -> TrainingProgress:
        """Switch to the sample order of a loaded state. Its stages may be older than those agreed on, so these are
        agreed on again."""
        self._feed.follow(progress.sampler)
        self._agreed = 0
        return progress
