"""The controller's part of a checkpoint: the marker that makes the ranks' shards one."""

import json
from pathlib import Path

from orchestrator.checkpoint.manifest import manifest_of
from orchestrator.checkpoint.write import commit
from orchestrator.policy.run_state import Commit

DIRECTORY = "checkpoints"  # in the run's directory


def commit_checkpoint(run_id: str, run_dir: Path, epoch: int, action: Commit) -> Path:
    """Mark the checkpoint complete, in the name of the controller's `epoch`. A repeat is harmless.

    Shapes are what the workers say in `meta["shapes"]`; a tensor that they don't mention is flat.

    Raises:
        CheckpointCorrupt: the shards don't cover every tensor, or a file is not what its rank wrote.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in action.shards:
        for name, _, _, stop in shard.entries:
            shapes[name] = (max(stop, *shapes.get(name, (0,))),)
    told = json.loads(action.shards[0].meta).get("shapes", {})
    shapes |= {name: tuple(shape) for name, shape in told.items() if name in shapes}
    manifest = manifest_of(action.shards, run_id=run_id, epoch=action.epoch, shapes=shapes)
    return commit(run_dir / DIRECTORY, manifest, epoch=epoch)
