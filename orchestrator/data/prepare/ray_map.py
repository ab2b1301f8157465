"""Execution of tasks on a cluster with Ray Data. Ray itself is imported on first use."""

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from orchestrator.errors import OrchestratorError

Spread = Callable[[Callable[[str], str], Sequence[str]], Iterable[str]]  # `map` is one too
TASK_CPUS = 0.66  # three tasks on two cores: no core is idle while Ray schedules the next task
MOST_BLOCKS = 4096  # blocks of Ray Data; more tasks than that share blocks


def on_cluster(function: Callable[[str], str], tasks: Sequence[str], memory: int | None = None) -> Iterator[str]:
    """Results of `function` for each task, in order of completion: a `map` on the cluster that Ray is connected to.

    The cluster runs 1.5 tasks per free CPU at once. Tasks of a failed node are repeated on others.

    Args:
        function: importable by name on every node.
        memory: bytes of a task; no node gets more tasks than it has memory for.

    Raises:
        OrchestratorError: the cluster is unreachable, or can't run the function.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # our own covers all stages
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    blocks = max(1, min(MOST_BLOCKS, len(tasks)))
    try:
        rows = ray.data.from_items([{"task": task} for task in tasks], override_num_blocks=blocks)
        for row in rows.map(_Work(function), num_cpus=TASK_CPUS, memory=memory).iter_rows():
            yield row["result"]
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise OrchestratorError(
            f"the tasks on the cluster failed: {_reason(error)}",
            remedy="Check that all nodes are up and have orchestrator installed, and start again.",
            unchanged="Nothing else was written; what is done is kept.",
        ) from error


def _reason(error: Exception) -> str:
    """The last error in a traceback that Ray passes on as text, without the advice that may follow it."""
    lines = str(error).strip().splitlines()
    named = [line for line in lines if re.match(r"(?!ray\.)[A-Za-z_][\w.]*(Error|Exception): ", line)]
    return (named or lines or [type(error).__name__])[-1]


class _Work:
    """The function on a row. One core per task: the tokenizer's own threads would compete for the others."""

    def __init__(self, function: Callable[[str], str]) -> None:
        self._function = function

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        return {"result": self._function(row["task"])}
