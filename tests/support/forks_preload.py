"""What the process imports from which `tests.support.forks` are forked."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed  # noqa: F401
import torch  # noqa: F401

import orchestrator.engine.deepspeed_engine
import orchestrator.worker.actor  # noqa: F401
import tests.support.faults  # noqa: F401
