"""The size of reports, which each worker sends several times a second."""

from pathlib import Path

import numpy as np
from ray import cloudpickle

from orchestrator.checkpoint.shard_file import ShardPiece
from orchestrator.worker.runtime.mailbox import WorkerMailbox
from tests.support.checkpoints import write_shard

MOST_BYTES = 4000


def test_shards_of_many_tensors_take_few_bytes_of_a_report(tmp_path: Path) -> None:
    mailbox = WorkerMailbox("w0", pid=1)
    pieces = [ShardPiece(f"master/layers.{i}.weight", 0, 1, np.zeros(1, np.float32)) for i in range(1000)]
    meta = '{"shapes": {' + ", ".join(f'"{piece.tensor}": [1]' for piece in pieces) + "}}"
    for step in range(5):
        mailbox.add_shard(write_shard(tmp_path, pieces, step=step, term=1, generation=0, rank=0, meta=meta))
    report = mailbox.report(None, known_version=-1, timeout_s=0.0)
    assert [shard.step for shard in report.shards] == [1, 2, 3, 4]
    assert len(cloudpickle.dumps(report)) < MOST_BYTES
