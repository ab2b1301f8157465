"""The engine behind the worker is DeepSpeed's; on a machine with a GPU it would take that for these tests."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
