"""Language modeling whose micro-batches take longer, so that a run which a test follows for minutes has few steps: a
user's task, of which options `delay_s` change no bit."""

import time
from typing import Any

from orchestrator.model.base import TrainableModel
from orchestrator.model.task import Batch, Loss
from orchestrator.model.tasks.language_modeling import LanguageModeling


class SlowTask(LanguageModeling):
    """Waits before each micro-batch."""

    def __init__(self, delay_s: float) -> None:
        self.delay_s = delay_s

    def loss(self, model: TrainableModel, batch: Batch) -> Loss:
        time.sleep(self.delay_s)
        return super().loss(model, batch)


def slow(options: dict[str, Any]) -> SlowTask:
    return SlowTask(options["delay_s"])
