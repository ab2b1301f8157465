"""Tasks spread over a cluster with Ray Data. Ray itself is imported when it is needed."""

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from orchestrator.errors import OrchestratorError

Spread = Callable[[Callable[[str], str], Sequence[str]], Iterable[str]]  # `map` is one too
TASK_CPUS = 0.66  # three tasks on two cores: none is idle while Ray hands out the next one
MOST_BLOCKS = 4096  # of Ray's: more tasks than these share them


def on_cluster(function: Callable[[str], str], tasks: Sequence[str]) -> Iterator[str]:
    """What `function` makes of each task, as it is done, in any order: `map` on the cluster that Ray is connected to.

    The cluster runs half as many again at once as it has CPUs free. Tasks of a node that is lost are done again on
    others.

    Args:
        function: importable by name on every node.

    Raises:
        OrchestratorError: the cluster went away, or can't run the function.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # there is one for all stages
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    blocks = max(1, min(MOST_BLOCKS, len(tasks)))
    try:
        rows = ray.data.from_items([{"task": task} for task in tasks], override_num_blocks=blocks)
        for row in rows.map(_Work(function), num_cpus=TASK_CPUS).iter_rows():
            yield row["result"]
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise OrchestratorError(
            f"the cluster couldn't do its part: {_reason(error)}",
            remedy="See that all nodes are up and have orchestrator installed, and start again.",
            unchanged="No store was written; what is done is kept.",
        ) from error


def _reason(error: Exception) -> str:
    """The error that is at the bottom of a traceback that Ray hands on as text, whatever advice follows it."""
    lines = str(error).strip().splitlines()
    named = [line for line in lines if re.match(r"(?!ray\.)[A-Za-z_][\w.]*(Error|Exception): ", line)]
    return (named or lines or [type(error).__name__])[-1]


class _Work:
    """The function on a row. One core per task: the tokenizer's own threads would fight over the others."""

    def __init__(self, function: Callable[[str], str]) -> None:
        self._function = function

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        return {"result": self._function(row["task"])}
