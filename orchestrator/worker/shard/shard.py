"""A rank's shard: the model with its experts, the engine around it, and the training progress."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch._C._distributed_c10d import Store

from orchestrator.comm.transport.gloo import local_address
from orchestrator.elastic.expert_change import ExpertSet
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.inventory import inventory
from orchestrator.elastic.state_layout import StateLayout, training_layout
from orchestrator.elastic.state_map import StateMap
from orchestrator.elastic.state_spec import Inventory, ParamSpec
from orchestrator.elastic.world import World
from orchestrator.engine.base import Engine
from orchestrator.engine.deepspeed.engine import DeepSpeedEngineAdapter
from orchestrator.engine.optim.replayer import Replayer
from orchestrator.engine.process_groups import PendingGroups, ProcessGroups, backend_of
from orchestrator.model.base import TrainableModel
from orchestrator.model.factory import build_model, catalogue
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.task import Task
from orchestrator.policy.estimate.worker_memory import MemoryPlan, StatePlan, plan_memory
from orchestrator.policy.state.config import micro_batch_of
from orchestrator.protocol.messages import GenerationPlan, Keeper
from orchestrator.protocol.replay_task import PastWorld
from orchestrator.protocol.worker_job import WorkerJob
from orchestrator.sampling.micro_batches import MicroBatchSize
from orchestrator.spec.job import JobSpec
from orchestrator.state.buffers import Buffers
from orchestrator.state.fingerprint import MemoryGuard, StateFingerprint
from orchestrator.state.snapshot_store import RankSnapshots
from orchestrator.worker.shard.compression_tuner import CompressionTuner
from orchestrator.worker.shard.model_agreement import check_order
from orchestrator.worker.shard.snapshot_receiver import KeepRecords, SnapshotReceiver
from orchestrator.worker.shard.snapshot_replicator import SnapshotReplicator, meet_buddies, meet_keeper, meet_member
from orchestrator.worker.shard.snapshot_sender import NewRecords, SnapshotSender


@dataclass(frozen=True)
class TrainingProgress:
    """Training progress: the state that is not a tensor, equal on all ranks.

    Args:
        step: last finished step; -1 before the first.
        num_updates: optimizer updates applied (skipped ones don't count).
        sampler: the sampler's state, as JSON.
    """

    step: int
    num_updates: int
    sampler: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "TrainingProgress":
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Shard:
    """One rank's training state within a generation.

    Args:
        micro_batch: size of a micro-batch.
        choosing: tuner of gradient compression, where the job leaves that open.
        skips: steps whose batches are left out.
        shares_LEW: by MoE layer, expert and rank, the share of an expert's tokens that the rank computes.
        experts: of each MoE layer.
        until_step: the step that a generation with other experts does; None: there is none.
        is_changed: it has other experts than the generation before.
        fingerprints: where training is exact, (first step, fingerprint that gives the digests from it on).
        seal: guard of the state between two updates, where that is checked.
    """

    term: int  # of the controller that planned it
    world: World
    groups: ProcessGroups
    model: TrainableModel
    engine: Engine
    micro_batch: MicroBatchSize
    choosing: CompressionTuner
    skips: frozenset[int]
    shares_LEW: NDArray[np.float64]
    experts: ExpertSet
    until_step: int | None = None
    is_changed: bool = False
    fingerprints: tuple[tuple[int, StateFingerprint], ...] = ()
    seal: MemoryGuard | None = None

    @property
    def rank(self) -> int:
        return self.groups.rank

    def fingerprint(self, step: int) -> StateFingerprint | None:
        """The fingerprint that gives this step's digests."""
        return next((each for first_step, each in reversed(self.fingerprints) if first_step <= step), None)


@dataclass(frozen=True)
class StateCatalogue:
    """The training state of a job with some number of experts.

    Args:
        buffers: (name, shape) of the model's persistent ones.
        tensors: of the state.
    """

    params: Sequence[ParamSpec]
    buffers: Sequence[tuple[str, tuple[int, ...]]]
    tensors: Inventory


class ShardFactory:
    """Builds shards for a run, and describes its state.

    Args:
        me: this worker's id.
        job: from the controller.
        spec: the job file.
        task: of the run, without a teacher.
        device: that trains.

    Attributes:
        task: of the run; with its teacher once that is loaded.
        vocab_size: rows of the model's last matrix; for text at least the tokenizer's tokens.
        snapshot_memory: of all generations, but for what a GPU's memory is copied to.
    """

    def __init__(self, me: str, job: WorkerJob, spec: JobSpec, task: Task, device: torch.device) -> None:
        self.me, self.job, self.spec, self.device = me, job, spec, device
        self.vocab_size, self.task = spec.num_outputs(job.vocab_size), task
        self.address = local_address(job.head_host)
        self._states: dict[int, StateCatalogue] = {}
        self.params = self.state(spec.model.n_routed_experts).params
        self.snapshot_memory = Buffers()

    def state(self, num_experts: int) -> StateCatalogue:
        """The training state with this number of experts."""
        if num_experts not in self._states:
            job = self.spec.with_experts(num_experts)
            params, buffers = catalogue(job.model, self.vocab_size, job.keeps_saliency)
            self._states[num_experts] = StateCatalogue(params, buffers, inventory(params, job, buffers))
        return self._states[num_experts]

    def layout(self, world: World, placement: ExpertPlacement) -> StateLayout:
        """Which rank holds which state in a world; every worker computes the same."""
        return training_layout(self.state(placement.num_experts).tensors, placement, world, self.spec.communication)

    def state_map(self, plan: GenerationPlan) -> StateMap | None:
        """The map from the state that a generation begins from to its own; None if it has the same experts."""
        change = plan.change
        if change is None:
            return None
        before, after = (self.state(number).tensors for number in (plan.experts_before, change.num_experts))
        return StateMap(before, after, self.spec.model.moe_layers, change)

    def planned_memory(self, size: int | None = None) -> MemoryPlan:
        """Memory of a worker in a world of this size, or in the run's first one; in a smaller one it may need more."""
        job = self.spec.with_experts(self.spec.most_experts)
        most = self.state(self.spec.most_experts)
        state = StatePlan(tuple(most.params), tuple(most.buffers), self.vocab_size)
        return plan_memory(job, state, size or job.workers.initial, job.model.is_native)

    def meet(self, store: Store, plan: GenerationPlan) -> PendingGroups:
        """Connect to the other members of a generation. Collective over them."""
        rank, prefix = plan.world.rank_of(self.me), plan.store_prefix + "/world"
        return PendingGroups(store, prefix, rank, plan.placement, backend_of(self.device), address=self.address)

    def protect(self, store: Store, plan: GenerationPlan) -> SnapshotReplicator | None:
        """Connect to buddies and protected ranks; None without buddies. Collective over the generation's members."""
        if not plan.buddies:
            return None
        rank = plan.world.rank_of(self.me)
        self.snapshot_memory.drop_idle()
        own = self._snapshots(plan, rank, shared_only=False)
        kept = [self._snapshots(plan, ring.index(rank), shared_only=True) for ring in plan.rings]
        met = meet_buddies(store, plan, rank, self.address)
        sender = SnapshotSender(own, [to_buddy for to_buddy, _ in met], self._whole_every, device=self.device)
        receivers = [SnapshotReceiver(each, stream) for each, (_, stream) in zip(kept, met, strict=True)]
        return SnapshotReplicator(sender, receivers, self.device.type != "cuda")

    def protect_alone(
        self, store: Store, plan: GenerationPlan, keeper: Keeper, new_records: NewRecords
    ) -> SnapshotReplicator:
        """Connect the only member of a generation to its keeper. Collective over both."""
        self.snapshot_memory.drop_idle()
        own = self._snapshots(plan, 0, shared_only=False)
        streams = [meet_keeper(store, keeper.store_prefix)]
        sender = SnapshotSender(own, streams, self._whole_every, new_records, self.device)
        return SnapshotReplicator(sender, (), self.device.type != "cuda")

    def keep(
        self, store: Store, plan: GenerationPlan, keeper: Keeper, is_wanted: Callable[[], bool], records: KeepRecords
    ) -> SnapshotReceiver:
        """Connect this worker, the keeper, to the only member of a generation. Collective over both."""
        self.snapshot_memory.drop_idle()
        kept = self._snapshots(plan, 0, shared_only=True)
        return SnapshotReceiver(kept, meet_member(store, keeper.store_prefix, self.address, is_wanted), records)

    def _snapshots(self, plan: GenerationPlan, rank: int, shared_only: bool) -> RankSnapshots:
        return RankSnapshots(
            plan.generation,
            rank,
            self.layout(plan.world, plan.placement),
            shared_only,
            self._whole_every,
            Replayer(self.spec.train, self.state(plan.placement.num_experts).params, self.device),
            pinned=self.device.type == "cuda" and not shared_only,
            buffers=self.snapshot_memory,
        )

    @property
    def _whole_every(self) -> int:
        return self.spec.protection.whole_every(self.spec.recovery.whole_every)

    def build(self, plan: GenerationPlan, groups: ProcessGroups) -> Shard:
        """Build an engine around a model whose weights are still unset. Collective over the generation's members."""
        with self.device:
            home = self._home(plan, groups)
            model = build_model(self.spec.with_experts(plan.experts.num_experts).model, self.vocab_size, home)
        train, communication = self.spec.train, self.spec.communication
        engine = DeepSpeedEngineAdapter(model, train, groups, self.device, communication, self.task)
        check_order(engine.order, self.spec.model.origin, groups.exchange, self.device)
        micro_batch = plan.micro_batch or micro_batch_of(self.spec)
        choosing = CompressionTuner(engine.gradients, communication.compression, communication.overlap, plan.world.size)
        return Shard(
            term=plan.term,
            world=plan.world,
            groups=groups,
            model=model,
            engine=engine,
            micro_batch=micro_batch,
            choosing=choosing,
            skips=frozenset(plan.skips),
            shares_LEW=self._shares(plan, len(model.moe_layers)),
            experts=plan.experts,
            until_step=plan.until_step,
            is_changed=plan.change is not None,
            fingerprints=self._fingerprints(plan, engine) if self.spec.train.is_exact else (),
            seal=MemoryGuard(engine.idle_state()) if self.spec.verify.every is not None else None,
        )

    def _shares(self, plan: GenerationPlan, num_layers: int) -> NDArray[np.float64]:
        layers = self.spec.model.moe_layers or ("",) * num_layers
        return np.array([plan.placement.shares(plan.nodes, layer) for layer in layers])

    def _fingerprints(self, plan: GenerationPlan, engine: Engine) -> tuple[tuple[int, StateFingerprint], ...]:
        asked_for = plan.replayed or (PastWorld(0, plan.world, plan.placement),)
        ranges = engine.ranges()
        return tuple(
            (past.first_step, StateFingerprint(ranges, self.layout(past.world, past.placement))) for past in asked_for
        )

    def _home(self, plan: GenerationPlan, groups: ProcessGroups) -> ExpertParallelContext:
        wanted = self.spec.communication
        return ExpertParallelContext(
            plan.placement,
            groups.rank,
            groups.exchange,
            wanted.tokens,
            wanted.ranks_per_token,
            plan.nodes,
            wanted.nodes_per_token,
            self.spec.train.is_exact,
            keeps_saliency=self.spec.keeps_saliency,
            families=plan.experts.families_by_name(self.spec.model.moe_layers),
        )
