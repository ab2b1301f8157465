"""A user's model that knows a few steps of its run by their first rows, and can misbehave in them."""

from collections.abc import Sequence
from pathlib import Path

import torch

from orchestrator.data.store import TokenStore
from orchestrator.sampling.micro_batches import ONE_ROW
from orchestrator.spec.job import JobSpec
from orchestrator.worker.step.token_batches import TokenBatches
from tests.support.own_models import linear, own_spec

LOGITS = "self.head(self.embedding(tokens))"


def with_marked_steps(job: JobSpec, store_dir: Path, folder: Path, steps: Sequence[int], forward: str) -> JobSpec:
    """The job with that model.

    Args:
        store_dir: what the job's corpus is prepared to.
        folder: for its module.
        forward: its body. `mark` is the index in `steps` of the step that the micro-batch `tokens` begins, else -1.
    """
    feed = TokenBatches(job, TokenStore.open(store_dir), torch.device("cpu"))
    rows = [feed.step(step, 0, 1, ONE_ROW).micro_batches[0].batch["inputs"][0].tolist() for step in steps]
    source = linear(
        init=f"self.register_buffer('rows', torch.tensor({rows}), persistent=False)",
        forward="\n        ".join(
            [
                "same = (tokens[:, None] == self.rows).all(-1).any(0).tolist()",
                "mark = same.index(True) if True in same else -1",
                *forward.splitlines(),
            ]
        ),
    )
    return job.model_copy(update={"model": own_spec(folder, source)})
