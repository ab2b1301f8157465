"""The memory guard of a shard, which a step opens before it uses the state."""

import platform

from orchestrator.worker.runtime.errors import StateCorrupted
from orchestrator.worker.shard.shard import Shard


def open_seal(shard: Shard, step: int) -> None:
    """Open the memory guard before the state is used in `step`. Raises StateCorrupted if it has changed by itself."""
    changed = shard.seal.open() if shard.seal is not None else []
    if changed:
        more = f" and {len(changed) - 1} more tensors" if len(changed) > 1 else ""
        raise StateCorrupted(
            f"{changed[0]}{more} of rank {shard.rank} on {platform.node()} changed between the ends of steps "
            f"{step - 1} and {step}, although nothing writes to it then"
        )
