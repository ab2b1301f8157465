"""A lone member and its keeper, connected over a real socket."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch._C._distributed_c10d import HashStore

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.state_layout import StateLayout
from orchestrator.elastic.state_spec import ParamSpec
from orchestrator.elastic.world import World
from orchestrator.protocol.step_record import BatchRecord, StepRecord, StepTiming, UpdateRecord
from orchestrator.state.ranges import NamedRanges
from orchestrator.state.snapshot_store import RankSnapshots
from orchestrator.worker.shard.snapshot_receiver import SnapshotReceiver
from orchestrator.worker.shard.snapshot_replicator import SnapshotReplicator, meet_keeper, meet_member
from orchestrator.worker.shard.snapshot_sender import SnapshotSender
from tests.support.layouts import layout_of_state

PARAMS = [ParamSpec("dense", (40,), None), ParamSpec("expert0", (6,), 0), ParamSpec("expert1", (6,), 1)]
LOOPBACK = "127.0.0.1"
WAIT_S = 60.0


def layout_of(members: tuple[str, ...]) -> StateLayout:
    return layout_of_state(PARAMS, ExpertPlacement.balanced(2, len(members)), World(4, members), True, [("bias", (3,))])


def shard_of(layout: StateLayout, rank: int, value: float) -> NamedRanges:
    ranges = NamedRanges()
    for tensor, start, stop in layout.ranges_of(layout.world.members[rank]).tolist():
        dtype = torch.bfloat16 if layout.itemsize[tensor] == 2 else torch.float32
        ranges.add(layout.names[tensor], start, torch.full((stop - start,), value, dtype=dtype))
    return ranges


def record_of(step: int) -> StepRecord:
    return StepRecord(
        step, 4, 1, 1.5, BatchRecord(10, step, 1), UpdateRecord(0.1, 1.0, applied=True), StepTiming(0.1, 0.0)
    )


class KeeperPair:
    """A lone member and its keeper, connected."""

    def __init__(self, after_step: int = 3) -> None:
        self.layout, self.records = layout_of(("a",)), list[StepRecord]()
        store, self.sent = HashStore(), after_step
        with ThreadPoolExecutor(2) as pool:
            there = pool.submit(meet_member, store, "1/keeper/0", LOOPBACK, lambda: True)
            here = pool.submit(meet_keeper, store, "1/keeper/0")
            from_member, to_keeper = there.result(WAIT_S), here.result(WAIT_S)
        self.kept = RankSnapshots(4, 0, self.layout, shared_only=True)
        self.receiver = SnapshotReceiver(self.kept, from_member, self.records.extend)
        sender = SnapshotSender(RankSnapshots(4, 0, self.layout, False), [to_keeper], 1, self._new_records)
        self.member = SnapshotReplicator(sender, (), takes_cores=True)
        self.receiver.start()

    def _new_records(self, step: int) -> Sequence[StepRecord]:
        before, self.sent = self.sent, step
        return [record_of(step) for step in range(before + 1, step + 1)]

    def take(self, step: int) -> None:
        self.member.sender.begin(step, shard_of(self.layout, 0, float(step)), f"note {step}")

    def close(self) -> None:
        self.member.close()
        self.receiver.shut()
