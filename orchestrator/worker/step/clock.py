"""Clock of a step: how long its phases take, and how much of that is waiting."""

import time
from collections.abc import Callable, Sequence

import torch

from orchestrator.comm import collective_stats
from orchestrator.engine.device_time import finished_s
from orchestrator.policy.health.stragglers import slowest
from orchestrator.protocol.step_record import StepTiming


class StepClock:
    """Runs from its construction, the beginning of the step. Each method marks the end of a phase.

    Args:
        device: that trains.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started_s, self._waited_s = time.perf_counter(), collective_stats.waited_s()
        self._loaded_s = self._updated_s = self._proposed_s = self._voted_s = self._started_s
        self._peers_s = 0.0  # waits for peers before the vote
        self._copies_s = 0.0  # waits for copies of the state

    def loaded(self) -> None:
        """The step's rows are there."""
        self._loaded_s = time.perf_counter()

    def wait_for_copies(self, wait: Callable[[], None]) -> None:
        """Wait until the state is copied, before the update may change it."""
        began_s = time.perf_counter()
        try:
            wait()
        finally:
            self._copies_s += time.perf_counter() - began_s

    def updated(self) -> None:
        """The rank's own part is done: update, validation, digests."""
        self._updated_s = finished_s(self._device)
        self._peers_s = collective_stats.waited_s() - self._waited_s

    @property
    def busy_s(self) -> float:
        """Time until the update was done, waits for peers and copies excluded."""
        return self._updated_s - self._started_s - self._peers_s - self._copies_s

    def proposed(self) -> None:
        """Record that the vote begins."""
        self._proposed_s = time.perf_counter()

    def voted(self) -> None:
        """The vote is over."""
        self._voted_s = time.perf_counter()

    def timing(self, busy_s: Sequence[float]) -> StepTiming:
        """The record of the step, which ends now.

        Args:
            busy_s: by rank, from the vote.
        """
        rank, slowness = slowest(busy_s)
        return StepTiming(
            step_s=time.perf_counter() - self._started_s,
            vote_time=time.time(),
            data_wait_s=self._loaded_s - self._started_s,
            protection_wait_s=self._copies_s + self._proposed_s - self._updated_s,
            communication_wait_s=self._peers_s + self._voted_s - self._proposed_s,
            slowest=rank,
            slowness=slowness,
        )
