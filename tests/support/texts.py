"""A little real text for tests that train: modules of the standard library, prepared as a token store."""

import sysconfig
from pathlib import Path
from typing import Any

from orchestrator.data.prepare.job_store import prepare
from orchestrator.spec.job import JobSpec

VOCAB = 300
STEPS = 30
HOLDOUT = 0.1
OPTIMIZERS: dict[str, dict[str, Any]] = {  # of a section `train`
    "adamw": {"ema": {"decay": 0.9}, "optimizer": {"groups": [{"params": ["*.router.*"], "lr_scale": 0.1}]}},
    "sgd": {"optimizer": {"name": "sgd"}, "lr": 0.5, "ema": {"decay": 0.9}},
    "lion": {"optimizer": {"name": "lion"}, "lr": 1e-3},
    "muon": {"optimizer": {"name": "muon"}, "ema": {"decay": 0.9}},
    "adafactor": {"optimizer": {"name": "adafactor"}, "lr": 0.2},
}


def write_texts(directory: Path) -> Path:
    """Thirty text files in `directory`."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.glob("*.py"))[:30]:
        (directory / f"{path.stem}.txt").write_text(path.read_text())
    return directory


def prepare_texts(texts: Path, directory: Path, difficulty: str | None = None) -> Path:
    """The token store of `texts`, in `directory`."""
    return prepare(str(texts), VOCAB, HOLDOUT, directory, difficulty=difficulty).directory


def small_job(texts: Path, model: dict[str, Any] | None = None, **train: Any) -> JobSpec:
    """A job of 30 steps over `texts`; a step takes some hundredths of a second."""
    return JobSpec.model_validate(
        {
            "schema": "v1",
            "name": "moves",
            "model": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "intermediate_size": 64,
                "n_routed_experts": 6,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                **(model or {}),
            },
            "train": {
                "max_steps": STEPS,
                "lr": 3e-3,
                "global_batch_size": 10,
                "micro_batch_size": 2,
                "sequence_length": 32,
                **train,
            },
            "eval": {"every": 10, "rows": 6},
            "data": {"source": str(texts), "vocab_size": VOCAB},
        }
    )
