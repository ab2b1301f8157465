"""Frozen values that cross process borders on their way to a worker.

`DesiredRunState` (Scheduler to RunController) and `Directive` (RunController to Worker) each carry the whole desired
state, so the newest wins and a repeat is harmless. A worker answers with a `Report`
(`orchestrator.protocol.worker_report`). Everything carries (term, generation); a receiver refuses a lower term."""

import hashlib
import json
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

from orchestrator.elastic.expert_change import ExpertChange, ExpertSet, OfLayers
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.world import World
from orchestrator.protocol.codec import to_plain
from orchestrator.protocol.replay_task import PastWorld, ReplayTask
from orchestrator.sampling.micro_batches import UNSAID, MicroBatchSize


class FinishMode(StrEnum):
    """Requested end of a run before its last step. All but `STOP_NOW` write a checkpoint."""

    NO = "no"
    STOP = "stop"
    STOP_NOW = "stop_now"
    PAUSE = "pause"


@dataclass(frozen=True)
class ExpertRequest:
    """A request for another number of experts.

    Args:
        number: counts requests.
        keep, noise, reinit_ratio, dissolve: as in the job (`spec.moe.experts.ScheduledExperts`).
    """

    number: int = 0
    num_experts: int = 0
    keep: str = "load"
    noise: float = 0.0
    reinit_ratio: float = 0.0
    dissolve: bool = False


@dataclass(frozen=True)
class DesiredRunState:
    """Desired state of a run, from the Scheduler. `by_hand`: a user requested this size. `stage` is the stage requested
    last, or `next` for the following one, and `stage_requests` counts such requests. `checkpoint`: a checkpoint of this
    step or a later one was requested; -1: none. `rebalances` counts requests to place experts by load."""

    seq: int
    workers: int
    finish: FinishMode = FinishMode.NO
    reason: str = ""
    stage: str = ""
    stage_requests: int = 0
    by_hand: bool = False
    checkpoint: int = -1
    rebalances: int = 0
    experts: ExpertRequest = field(default_factory=ExpertRequest)


FIRST_INTERVAL_S = 600.0  # of training between two checkpoints with `checkpoint.every: auto`, until their cost is known


@dataclass(frozen=True)
class Restore:
    """A complete checkpoint to restore from: its last finished step, and its directory.

    `reset_residuals`: the residuals of gradient compression are not restored. `digest`: SHA-256 that its manifest must
    have; empty for any.
    """

    step: int
    path: str
    reset_residuals: bool = False
    digest: str = ""


@dataclass(frozen=True)
class ResumeRequest:
    """Request to resume a run that has ended or lost its cluster. `token` distinguishes repeats from new requests.

    `restore` is None for a run without any checkpoint: it begins again at step 0. `workers` is None to keep the number
    that was wanted last. Unless its user named the checkpoint (`is_named`), it was the newest when it was chosen.
    `code` has the digests of other packages of the job's own code, by their directories; None to keep those of before.
    """

    token: str
    restore: Restore | None
    workers: int | None = None
    is_named: bool = False
    code: dict[str, str] | None = None


@dataclass(frozen=True)
class StateSource:
    """Source of a generation's state: the world that produced it, and the workers that hold it.

    `step` is the finished step after which the state is taken; None for the fence that the members of `world` reach.
    `holders` lists by rank the worker that has the rank's shard: its own or, after a failure, a buddy's copy.
    `is_changed`: it has other experts than that step, so it isn't what the step's record has the digest of.
    """

    world: World
    placement: ExpertPlacement
    holders: tuple[str, ...]
    step: int | None = None
    is_changed: bool = False


@dataclass(frozen=True)
class StoreAddress:
    """Address of the run's rendezvous store. A restarted store has another address."""

    host: str
    port: int


@dataclass(frozen=True)
class GenerationPlan:
    """Plan of a generation: its members, the placement of experts on ranks, and the source of its state.

    `source` is None for a state that is initialized from the seed, or read from the checkpoint `restore`. Workers
    of the source that are not in `world` send their shards and become standbys. `buddies` lists by rank the rank
    that keeps its snapshots, `second_buddies` another one; empty without snapshots, or with one copy.
    `store_prefix` prefixes the generation's keys in the rendezvous store: it contains term and generation, so that
    processes of earlier generations can't join this world. All members meet in the store at `store_address`; a
    connected world no longer needs it. `micro_batch` is the size of micro-batches, by default the job's; `skips`
    are steps whose batches are left out. `nodes` lists the node of each rank; empty if unknown. `replayed`: worlds
    whose steps this one replays for comparison; digests of its steps are then by their ranks. `change`: the experts
    differ from those of the state that it begins from; `families` are its experts'. At `until_step`, if there is one, a
    generation with other experts begins.
    """

    term: int
    world: World
    placement: ExpertPlacement
    source: StateSource | None
    store_prefix: str
    store_address: StoreAddress
    buddies: tuple[int, ...] = ()
    second_buddies: tuple[int, ...] = ()
    restore: Restore | None = None
    micro_batch: MicroBatchSize = UNSAID
    skips: tuple[int, ...] = ()
    nodes: tuple[str, ...] = ()
    replayed: tuple[PastWorld, ...] = ()
    change: ExpertChange | None = None
    families: OfLayers = ()
    until_step: int | None = None

    @property
    def experts(self) -> ExpertSet:
        """The experts of each MoE layer."""
        return ExpertSet(self.placement.num_experts, self.families)

    @property
    def experts_before(self) -> int:
        """Experts of a layer in the state that it begins from."""
        if self.change is None:
            return self.placement.num_experts
        return self.change.num_before

    @property
    def generation(self) -> int:
        return self.world.generation

    @cached_property
    def digest(self) -> str:
        """Digest of all fields, 128 bits in hexadecimal digits, by which a worker knows the plan."""
        return hashlib.blake2b(json.dumps(to_plain(self)).encode(), digest_size=16).hexdigest()

    @property
    def rings(self) -> tuple[tuple[int, ...], ...]:
        """Assignments of buddies, one for each copy of the snapshots."""
        return tuple(ring for ring in (self.buddies, self.second_buddies) if ring)

    @property
    def involved(self) -> tuple[str, ...]:
        """Participants of the transition: holders of the state in rank order, then the other members."""
        holders = self.source.holders if self.source else ()
        return tuple(dict.fromkeys(holders + self.world.members))

    @property
    def newcomers(self) -> tuple[str, ...]:
        """Members that hold nothing of the state."""
        holders = self.source.holders if self.source else ()
        return tuple(member for member in self.world.members if member not in holders)


@dataclass(frozen=True)
class Fence:
    """End of the current generation: after the step `at_step` or, if None, after the first step whose vote shows that
    every member has seen this fence."""

    to_generation: int
    at_step: int | None = None


@dataclass(frozen=True)
class StageStart:
    """Start of a curriculum stage at `first_step`, decided during training and overriding the job's plan. `after` is
    the stage that it ends: the decision is void if another stage has begun by then. Empty: it ends any stage."""

    name: str
    first_step: int
    after: str = ""


@dataclass(frozen=True)
class Keeper:
    """A standby that keeps the snapshots of a world of one.

    Args:
        number: distinguishes the keepers of a run; only grows.
        generation: the one whose snapshots it keeps.
        store_address, store_prefix: where it and the member meet.
        after_step: with the first snapshot it gets the records of the steps after this one.
    """

    number: int
    worker: str
    generation: int
    store_address: StoreAddress
    store_prefix: str
    after_step: int


@dataclass(frozen=True)
class Directive:
    """The whole desired state of a worker.

    Args:
        current: the generation in training; None before the first.
        next: the generation to prepare in the background.
        fence: where `current` hands over to `next`.
        activated: newest generation that may train: a worker that is ready for one waits until it is activated.
        aborted: newest generation that must stop training because a member failed. Workers that wait for a peer in it
            close the connection.
        settled: newest generation that has committed a step: state of older ones may be freed.
        finish: requests a fence, a checkpoint and the end.
        checkpoint_done, checkpoint_generation: step of the newest checkpoint that the controller has marked complete,
            and the generation that wrote it.
        checkpoint_interval_s: training time between two checkpoints with `checkpoint.every: auto`.
        checkpoint_from: a checkpoint of this step or a later one was requested and is not complete yet; -1: none.
        stages, stages_version: all decisions on stages so far, in order, and their number. Members apply a decision
            once all of them have seen it; parts of it about steps before the one after the next are too late and
            ignored.
        keepers: standbys that may hold snapshots of a current world of one, oldest first. Its member connects to the
            last one; the others may free their snapshots once they are no longer named.
        journalled: a step up to which the records are in the journal: later ones must not get lost.
    """

    term: int
    seq: int
    current: GenerationPlan | None = None
    next: GenerationPlan | None = None
    fence: Fence | None = None
    activated: int = -1
    aborted: int = -1
    settled: int = -1
    finish: FinishMode = FinishMode.NO
    checkpoint_done: int = -1
    checkpoint_generation: int = -1
    checkpoint_interval_s: float = FIRST_INTERVAL_S
    checkpoint_from: int = -1
    stages: tuple[StageStart, ...] = ()
    stages_version: int = 0
    check: ReplayTask | None = None
    keepers: tuple[Keeper, ...] = ()
    journalled: int = -1

    @property
    def plans(self) -> tuple[GenerationPlan, ...]:
        return tuple(plan for plan in (self.current, self.next) if plan is not None)

    def has_checkpoint(self, generation: int, step: int) -> bool:
        """Whether a checkpoint of this step or a later one, by this generation or a later one, is complete. Those of
        earlier generations don't count: the run may have gone back to a step before theirs."""
        return (self.checkpoint_generation, self.checkpoint_done) >= (generation, step)
