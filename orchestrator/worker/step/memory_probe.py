"""What the slots of a generation take of this worker's memory, gathered step by step."""

import torch

from orchestrator.protocol.messages import SlotMemory
from orchestrator.worker.step.batches import StepFeed
from orchestrator.worker.step.memory import allocated_bytes, give_back, room, taken_bytes

SMALLER = 0.9  # times as large as the largest slot of the generation before


class Gauge:
    """Used by the training thread.

    Args:
        device: whose memory slots take: the machine's, or a GPU's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept = self._before = 0
        self._newest: SlotMemory | None = None

    def begin_pass(self) -> None:
        """Called before the forward pass of a slot."""
        self._before = allocated_bytes(self._device)

    def end_forward(self) -> None:
        """Called between a slot's forward and its backward pass."""
        self._kept = max(self._kept, allocated_bytes(self._device) - self._before)

    def end_step(self, generation: int, feed: StepFeed) -> SlotMemory:
        """Called after a step. Returns what is known of its generation's slots of such rows."""
        last, there = self._newest, room(self._device)
        if last is not None and last.generation != generation and max(feed.padded_tokens) < SMALLER * last.tokens:
            give_back(self._device)  # else what larger slots took would keep these from growing again
            there = room(self._device)
        is_first = last is None or (last.generation, last.sequence_length) != (generation, feed.sequence_length)
        self._newest = SlotMemory(
            generation=generation,
            sequence_length=feed.sequence_length,
            steps=1 if is_first or last is None else last.steps + 1,
            tokens=max([0 if is_first or last is None else last.tokens, *feed.padded_tokens]),
            num_slots=feed.num_slots,
            kept_bytes=max(self._kept, 0 if is_first or last is None else last.kept_bytes),
            resident_bytes=taken_bytes(self._device),
            limit_bytes=there.limit_bytes,
            used_bytes=there.used_bytes,
            place=there.place,
            is_gpu=self._device.type == "cuda",
        )
        self._kept = 0
        return self._newest
