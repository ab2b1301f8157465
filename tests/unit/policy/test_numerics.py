"""Whose numerics are not the run's, in words."""

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.world import World
from orchestrator.policy.replay_check import differences, doubt, shown
from orchestrator.protocol.events.base import JournalEntry
from orchestrator.protocol.events.notices import NumericsDiffer
from orchestrator.protocol.replay_task import PastWorld
from orchestrator.submission.verification import differing_workers


def test_what_differs_is_shown_by_worker() -> None:
    differs = differences({"threads": 1, "mkl": "m", "torch": "2"}, {"threads": 2, "mkl": "m", "gpu": "g"})
    assert differs == {"gpu": "None -> g", "threads": "1 -> 2", "torch": "2 -> None"}
    more = {"threads": "1 -> 2", "gpu": "None -> g"}
    assert shown({"w1": more, "w2": {"threads": "1 -> 3"}, "w4": more}) == (
        "w1, w4 (threads: 1 -> 2, gpu: None -> g); w2 (threads: 1 -> 3)"
    )


def test_steps_are_doubted_only_if_somebody_else_than_here_did_them() -> None:
    other = {"threads": "1 -> 2"}
    assert doubt(["w0", "w1"], {}, {}) == ""
    assert doubt(["w2", "w3"], {"w2": other, "w3": other}, other) == ""  # the run went on elsewhere, and here is there
    mixed = doubt(["w0", "w2"], {"w2": other}, {})
    assert mixed.endswith("this process, which may be the only cause: w2 (threads: 1 -> 2).")
    assert doubt(["w0"], {}, other).endswith("only cause: this process (threads: 1 -> 2).")
    assert doubt(["w0", "w2"], {"w2": other}, other).endswith("only cause: w2, this process (threads: 1 -> 2).")


def test_only_workers_that_did_the_steps_count() -> None:
    told = [JournalEntry(0, 1, 0.0, NumericsDiffer(worker, {"threads": "1 -> 2"})) for worker in ("w1", "w3")]
    worlds = [
        PastWorld(first_step, World(generation, members), ExpertPlacement.balanced(4, len(members)))
        for generation, (first_step, members) in enumerate([(0, ("w0",)), (5, ("w0", "w1"))])
    ]
    assert differing_workers(told, worlds) == {"w1": {"threads": "1 -> 2"}}
    assert differing_workers(told, worlds[:1]) == {}
