"""What the process imports from which `tests.support.forks` are forked."""

import gc
import os

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["GOMP_SPINCOUNT"] = (
    "0"  # more workers than cores: a thread that spins would hold up the one that it waits for
)

import deepspeed  # noqa: F401
import torch  # noqa: F401
import transformers.models.dots1.modeling_dots1  # 3 s in each worker with a model of transformers
import transformers.models.qwen2_moe.modeling_qwen2_moe  # noqa: F401

import orchestrator.engine.deepspeed.engine
import orchestrator.worker.actor  # noqa: F401
import tests.support.devices
import tests.support.faults  # noqa: F401

gc.collect()
gc.freeze()  # no search for garbage in a fork goes through all of this again, and copies its pages
