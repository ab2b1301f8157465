"""Position of a worker in its run: the last finished step that it knows of, and the rows that follow.

Members agree on curriculum stages that are decided while the run trains. A decision comes with a directive, which
reaches each member at its own time. All begin to follow it after the same vote: the first in which every member names
it. The rows of the next step may have been read by then, so a change of that step comes too late, for all members
alike, and is left out.
"""

import logging
from dataclasses import replace

from orchestrator.errors import DataError
from orchestrator.protocol.messages import Directive
from orchestrator.worker.shard.shard import TrainingProgress
from orchestrator.worker.step.batches import BatchReader
from orchestrator.worker.step.vote import VoteResult

log = logging.getLogger("orchestrator.worker")


class RunPosition:
    """Keeps the reader and the training progress at the same sample order. Used by the training thread.

    Attributes:
        progress: after the last step that the members have finished, or from which the run continues.
    """

    def __init__(self, feed: BatchReader) -> None:
        self._feed = feed
        self.progress = TrainingProgress(-1, 0, feed.first_order)
        self._proposed = Directive(term=-1, seq=-1)
        self._agreed = 0  # version of the newest decision that was agreed on

    @property
    def step(self) -> int:
        """The last finished step; -1 before the first."""
        return self.progress.step

    @property
    def first_order(self) -> str:
        """The sample order at the start of the run, in its saved form."""
        return self._feed.first_order

    def propose(self, directive: Directive) -> int:
        """The version of the stages that this worker names in its vote."""
        self._proposed = directive
        return directive.stages_version

    def advance(self, outcome: VoteResult, progress: TrainingProgress) -> None:
        """Move to the progress after a vote, with the stages agreed on in it."""
        stages, version = self._proposed.stages, self._proposed.stages_version
        if version == outcome.stages and version != self._agreed:
            self._agreed = version
            try:
                self._feed.decide(stages, first_step=progress.step + 2)
            except (ValueError, DataError) as error:  # the same on all members
                log.warning("stages %s can't be followed: %s", stages, error)
            progress = replace(progress, sampler=self._feed.order.to_json())
        self.progress = progress

    def follow(self, progress: TrainingProgress) -> None:
        """Move to a loaded state. Its stages may be older than those agreed on, so these are agreed on again."""
        self._feed.follow(progress.sampler)
        self._agreed = 0
        self.progress = progress
