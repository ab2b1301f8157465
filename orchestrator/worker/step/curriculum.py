"""How a worker follows what is decided about the stages of a curriculum while the run trains.

A decision comes with a directive, to each member at its own time. All begin to follow it after the same vote: the first
in which every one of them speaks of it. The rows of the next step may have been read by then, so what it says of that
step comes too late, for all members alike, and is left out.
"""

import logging
from dataclasses import replace

from orchestrator.errors import DataError
from orchestrator.protocol.messages import Directive
from orchestrator.worker.shard.shard import Progress
from orchestrator.worker.step.batches import BatchReader
from orchestrator.worker.step.vote import VoteResult

log = logging.getLogger("orchestrator.worker")


class Stages:
    """Keeps the feed and the progress of training at the same order of samples. Used by the training thread."""

    def __init__(self, feed: BatchReader) -> None:
        self._feed = feed
        self._spoken = Directive(term=-1, seq=-1)
        self._agreed = 0  # version of the newest decision that was agreed on

    def speak(self, directive: Directive) -> int:
        """What this worker has to say of stages in its vote."""
        self._spoken = directive
        return directive.stages_version

    def agree(self, outcome: VoteResult, progress: Progress) -> Progress:
        """The progress after a vote, with the stages that were agreed on in it."""
        spoken, version = self._spoken.stages, self._spoken.stages_version
        if version != outcome.stages or version == self._agreed:
            return progress
        self._agreed = version
        try:
            self._feed.decide(spoken, first_step=progress.step + 2)
        except (ValueError, DataError) as error:  # the same on all members
            log.warning("stages %s can't be followed: %s", spoken, error)
        return replace(progress, sampler=self._feed.order.to_json())

    def follow(self, progress: Progress) -> Progress:
        """Train in the order of a state that was taken over. What it has of decisions may be older than what was agreed
        on, so these are agreed on again."""
        self._feed.follow(progress.sampler)
        self._agreed = 0
        return progress
