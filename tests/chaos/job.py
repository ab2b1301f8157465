"""Small exact job of a chaos run."""

import json
from pathlib import Path
from typing import Any

from tests.chaos.schedule import LEAST_WORKERS, MOST_WORKERS
from tests.support.texts import VOCAB

KEEP_LAST = 2
ENDLESS = 1_000_000  # steps of a run that is stopped

MODEL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}


def write_job(path: Path, texts: Path, storage: Path, steps: int, **changes: Any) -> Path:
    """Write the job file. Losses don't depend on the number of steps: the learning rate is constant.

    Args:
        changes: sections of the job.
    """
    train = {"lr": 3e-3, "global_batch_size": 10, "micro_batch_size": 2, "sequence_length": 32}
    job = {
        "schema": "v1",
        "name": path.stem,
        "storage": str(storage),
        "model": MODEL,
        "train": train | {"max_steps": steps, "determinism": "exact", "lr_scheduler": {"kind": "constant"}},
        "eval": {"every": 10, "rows": 6},
        "data": {"source": str(texts), "vocab_size": VOCAB},
        **changes,
    }
    path.write_text(json.dumps(job))
    return path


def disturbed(workers: int) -> dict[str, Any]:
    """Sections of a run to which faults happen."""
    sizes = {"min": LEAST_WORKERS, "max": MOST_WORKERS, "initial": workers, "standby": 1}
    return {"workers": sizes, "checkpoint": {"every": 20, "keep_last": KEEP_LAST}}


def undisturbed() -> dict[str, Any]:
    """Sections of a run that only trains."""
    return {"workers": 1, "protection": {"every": "none"}, "checkpoint": {"every": "none"}}
