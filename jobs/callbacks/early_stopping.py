"""A callback that ends a run whose validation loss no longer falls (docs/callbacks.md)."""

from orchestrator.callback import Callback, SaveCheckpoint, Stop


class EarlyStopping(Callback):
    """Requests a checkpoint after each validation that is better than all before, and the run's end after `patience`
    validations in a row that aren't."""

    def __init__(self, patience: int = 3, min_delta: float = 0.0) -> None:
        self.patience, self.min_delta = patience, min_delta
        self.best, self.waited = float("inf"), 0

    def on_step(self, step):
        if step.validation_loss is None:
            return None
        if step.validation_loss < self.best - self.min_delta:
            self.best, self.waited = step.validation_loss, 0
            return SaveCheckpoint(f"validation loss {self.best:.4f}")
        self.waited += 1
        if self.waited < self.patience:
            return None
        return Stop(f"{self.waited} validations without one below {self.best:.4f}")

    def state_dict(self):
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state):
        self.best, self.waited = state["best"], state["waited"]


def early_stopping(options):
    return EarlyStopping(**options)
