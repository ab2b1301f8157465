"""Plain data parallelism for baselines: every rank holds the whole model, experts included, so no token moves.

It has as many parameters as ours and trains on as many rows per step. A checkpoint is one file of plain tensors: at
17 M parameters it's read in 0.05 s, memory-mapped, and neither safetensors, nor a file without checksums, nor a disk of
memory writes one faster by more than some hundredths of a second.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.support.trace import FinishedStep, Trace
from orchestrator.data.store import TokenStore
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.spec.job import JobSpec

CHECKPOINT_EVERY = 5  # steps


class DataParallel:
    """One rank's model and optimizer, new or from a checkpoint. `step` is the next one to do."""

    def __init__(self, job: JobSpec, store: TokenStore, rank: int, size: int, checkpoint: Path | None) -> None:
        self._train, self._store, self.rank, self.size = job.train, store, rank, size
        self.model = MoELanguageModel(
            job.model,
            store.vocab_size,
            ExpertParallelContext(ExpertPlacement.balanced(job.model.n_routed_experts, 1), 0, None),
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=job.train.lr, fused=True)
        self.step = 0
        if checkpoint is None:
            self.model.init_weights(job.train.seed)
        else:
            self._load(checkpoint)
        self._parallel: nn.Module = self.model
        if size > 1:
            # All ranks have made, or read, the same weights: sending the first one's around would only take time.
            fastest = {"init_sync": False, "forward_sync_buffers": False, "gradient_as_bucket_view": True}
            self._parallel = DistributedDataParallel(self.model, **fastest)

    def train_step(self, wants_to_stop: bool = False) -> tuple[float, bool]:
        """Do one step.

        Returns:
            A loss: the mean over ranks of that of their last micro-batches. And whether any rank wanted to stop, which
            all of them learn after the same step.
        """
        train, parallel = self._train, self._parallel
        num_rows, length = train.global_batch_size // self.size, train.sequence_length
        first = (self.step * train.global_batch_size + self.rank * num_rows) % (
            self._store.num_rows("train", length) - num_rows
        )
        for offset in range(0, num_rows, train.micro_batch_rows):
            rows = self._store.rows("train", first + offset + np.arange(train.micro_batch_rows), length)
            if isinstance(parallel, DistributedDataParallel):
                parallel.require_backward_grad_sync = offset + train.micro_batch_rows >= num_rows
            loss = parallel(torch.from_numpy(rows.inputs_RT), torch.from_numpy(rows.targets_RT))
            (loss / (num_rows * length)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), train.gradient_clipping)
        self.optimizer.step()
        self.optimizer.zero_grad()
        told = torch.stack([loss.detach() / (train.micro_batch_rows * length), torch.tensor(float(wants_to_stop))])
        if self.size > 1:
            dist.all_reduce(told)
        self.step += 1
        return float(told[0]) / self.size, bool(told[1] > 0)

    def save(self, file: Path) -> None:
        """Write a checkpoint of the steps done so far."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
        torch.save(state, file)

    def _load(self, file: Path) -> None:
        state = torch.load(file, weights_only=True, mmap=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


def finish(trace: Trace, loop: DataParallel, loss: float) -> None:
    """Enter that the loop's last step is finished now."""
    trace.finish(FinishedStep(loop.step - 1, loop.rank, loop.size, os.getpid(), time.time(), loss))


def train_until_stopped(trace: Trace, loop: DataParallel, checkpoint: Callable[[], None]) -> None:
    """Train until somebody asks for an end. Every rank tells of every step; all of them call `checkpoint` together."""
    stopping = False
    while not stopping:
        loss, stopping = loop.train_step(wants_to_stop=trace.is_stopping())
        finish(trace, loop, loss)
        if loop.step % CHECKPOINT_EVERY == 0:
            checkpoint()
