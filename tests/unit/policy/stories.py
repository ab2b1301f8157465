"""Journals of simulated runs, written event by event with a simulated clock."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.protocol.events.base import Event, JournalEntry, plain_of_entry
from orchestrator.protocol.events.generations import Activated, GenerationAborted
from orchestrator.protocol.events.run import Admitted, Ended, Preempted, Queued, Resumed, Submitted, Suspended
from orchestrator.protocol.events.training import StepsCommitted
from orchestrator.protocol.events.workers import WorkerLost, WorkersReleased, WorkersSpawned
from orchestrator.protocol.status import Rescale
from orchestrator.protocol.step_record import StepRecord
from orchestrator.spec.job import JobSpec
from tests.support.recorded_run import write_journal
from tests.unit.policy.imagined import record

MOVE = {"connect_s": 0.01, "build_s": 0.05, "transfer_s": 0.02, "digest_s": 0.03}
WAITS = {"communication_wait_s": 0.2, "data_wait_s": 0.05, "protection_wait_s": 0.05}


@dataclass
class Story:
    """A run on workers w0, w1, and so on. `now_s` is the time of day."""

    now_s: float = 1_000_000.0
    events: list[JournalEntry] = field(default_factory=list)
    worker_group: list[str] = field(default_factory=list)
    members: list[str] = field(default_factory=list)
    spawned: int = 0
    generation: int = -1
    step: int = 0

    def tell(self, event: Event) -> None:
        self.events.append(JournalEntry(len(self.events), 1, self.now_s, event))

    def spawn(self, count: int) -> None:
        names = [f"w{self.spawned + number}" for number in range(count)]
        self.spawned += count
        self.worker_group += names
        self.tell(WorkersSpawned(tuple(names)))

    def start(self, workers: int, warm_s: float = 8.0) -> None:
        self.tell(Submitted("run", workers))
        self._begin(workers, warm_s)

    def _begin(self, workers: int, warm_s: float) -> None:
        self.worker_group, self.members = [], []
        self.spawn(workers)
        self.now_s += warm_s
        self.activate(workers)

    def wait(self, seconds: float) -> None:
        """In the queue, until it is let in."""
        self.tell(Queued("there is no room for 1 worker"))
        self.now_s += seconds
        self.tell(Admitted(None, 2, "there is room for all 2", seconds))

    def give_way(self, queued_s: float, workers: int) -> None:
        """All places are given away, with a checkpoint, and come back."""
        self.tell(Preempted(0, workers, "high needs its places", self.step - 1))
        self.now_s += 0.5
        self.tell(Suspended(self.step - 1, "somewhere"))
        self.wait(queued_s)
        self._begin(workers, 8.0)

    def activate(self, workers: int, **took: float) -> None:
        self.generation += 1
        before, self.members = len(self.members), self.worker_group[:workers]
        rescale = Rescale(self.generation, before, workers, self.step - 1, "asked for")
        self.tell(Activated(**vars(rescale), members=tuple(self.members), **took))

    def train(self, steps: int, step_s: float = 1.0, between_s: float = 0.0, **changes: Any) -> None:
        """Steps of the current world, journalled together."""
        done: list[StepRecord] = []
        for _ in range(steps):
            self.now_s += step_s + between_s
            size = {"world_size": len(self.members)}
            done.append(record(self.step, self.generation, self.now_s, step_s, **{**WAITS, **size, **changes}))
            self.step += 1
        self.tell(StepsCommitted(tuple(done)))

    def rescale(self, workers: int, stall_s: float = 0.3) -> None:
        missing = workers - len(self.worker_group)
        if missing > 0:
            self.spawn(missing)
        self.now_s += stall_s
        self.activate(workers, **MOVE)
        if surplus := self.worker_group[workers:]:
            self.worker_group = self.worker_group[:workers]
            self.tell(WorkersReleased(tuple(surplus)))

    def kill(self, detect_s: float = 0.1, recover_s: float = 0.25) -> None:
        """The last member dies, the others go on without it."""
        self.now_s += detect_s
        lost = self.members[-1]
        self.tell(GenerationAborted(self.generation, self.step - 1, f"{lost} died"))
        self.worker_group.remove(lost)
        self.tell(WorkerLost(lost, "died", member=True))
        self.now_s += recover_s
        self.activate(len(self.members) - 1, **MOVE)

    def end(self, outcome: str, after_s: float = 0.2) -> None:
        self.now_s += after_s
        self.tell(Ended(outcome, ""))

    def resume(self, workers: int, after_s: float = 600.0, step: int | None = None) -> None:
        self.now_s += after_s
        done = self.step - 1 if step is None else step
        self.tell(Resumed(str(len(self.events)), done, None, workers))
        self.step = done + 1
        self._begin(workers, 8.0)


def eventful() -> Story:
    """Three workers, one is killed, two become three again, a pause of ten minutes, two more minutes of training."""
    story = Story()
    story.start(3)
    story.train(60)
    story.kill()
    story.train(40)
    story.rescale(3)
    story.train(40)
    story.end("paused")
    story.resume(2)
    story.train(60)
    story.end("succeeded")
    return story


def write(story: Story, run_dir: Path, job: JobSpec) -> Path:
    """The run's directory in run storage, as its controller would have left it at those times of day."""
    write_journal(run_dir, [plain_of_entry(entry) for entry in story.events])
    (run_dir / "job.json").write_text(job.model_dump_json(by_alias=True))
    return run_dir
