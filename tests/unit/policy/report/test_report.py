"""What a run's journal is made into. Real journals are read in tests/integration/test_report.py."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.elastic.state_spec import ParamSpec
from orchestrator.errors import NotFinished, UsageError
from orchestrator.policy.estimate.flops import ModelSize, size_of
from orchestrator.policy.report.energy import EnergyMethod
from orchestrator.policy.report.goodput import Use
from orchestrator.policy.report.report import Rates, RunReport, report_of
from orchestrator.protocol.changes import changed
from orchestrator.protocol.events.generations import GenerationAborted, RolledBack
from orchestrator.protocol.events.run import Preempted, Queued, Submitted, Suspended
from orchestrator.protocol.events.training import StepsCommitted
from orchestrator.spec.exits import ExitsSpec
from orchestrator.spec.job import JobSpec
from tests.unit.policy.stories import MOVE, Story, eventful

EMPTY = ModelSize(parameters=10, active_parameters=10.0, attention=None, length=32)


def report(story: Story, rates: Rates | None = None, size: ModelSize | None = None) -> RunReport:
    return report_of("run", story.events, gpus_per_worker=2.0, size=size, rates=rates)


def known_seconds(account: RunReport) -> float:
    return sum(spent.seconds for spent in account.time if spent.seconds is not None)


def test_worker_hours_reconcile_across_a_kill_a_rescale_and_a_pause() -> None:
    account = report(eventful())
    hours = account.workers
    # By hand: members from each activation to the loss of one, the next activation, or the end.
    expected_s = 3 * 60.1 + 2 * (0.25 + 40 + 0.3) + 3 * (40 + 0.2) + 2 * (60 + 0.2)
    assert hours.members == pytest.approx(expected_s / 3600)
    assert hours.difference is not None and abs(hours.difference) <= 0.01 and hours.reconciles
    assert hours.difference != 0.0  # two accounts, not one twice
    # Held from when they were asked for: the third worker of the last world since before its fence.
    held_s = expected_s + 3 * 8 + 2 * 8 + 1 * 0.3
    assert hours.held == pytest.approx(held_s / 3600) and hours.gpu == pytest.approx(2 * held_s / 3600)
    assert account.paused_s == pytest.approx(600.0) and account.down_s == 0.0
    assert account.elapsed_s == pytest.approx(8 + 60 + 0.35 + 40 + 0.3 + 40 + 0.2 + 8 + 60 + 0.2)
    assert [span.outcome for span in account.attempts] == ["paused", "succeeded"]


def test_time_in_the_queue_is_nobodys() -> None:
    """Before the first step and after the places were given away; worker-hours reconcile beside it."""
    story = Story()
    story.tell(Submitted("run", 2))
    story.wait(50.0)
    story._begin(2, 8.0)
    story.train(60)
    story.give_way(300.0, 2)
    story.train(60)
    story.end("succeeded")
    account = report(story)
    assert account.queued_s == pytest.approx(350.0) and (account.paused_s, account.down_s) == (0.0, 0.0)
    assert account.elapsed_s == known_seconds(account) == pytest.approx(8 + 60 + 0.5 + 8 + 60 + 0.2)
    assert [span.outcome for span in account.attempts] == ["suspended", "succeeded"]
    assert account.workers.members == pytest.approx(2 * (60.5 + 60.2) / 3600) and account.workers.reconciles
    assert account.steps == 120 and account.wasted_steps == 0


def test_a_run_that_ends_in_the_queue_waited_to_its_end() -> None:
    """The reason for which it waits may be known before it has stopped."""
    story = Story()
    story.start(2)
    story.train(10)
    story.tell(Preempted(0, 2, "high needs its places", 9))
    story.tell(Queued("there is no room for 2 workers"))
    story.now_s += 0.5
    story.tell(Suspended(9, "somewhere"))
    story.now_s += 30.0
    story.end("stopped", 0.0)
    assert report(story).queued_s == pytest.approx(30.0)


def test_a_run_that_was_never_admitted_has_no_duration() -> None:
    story = Story()
    story.tell(Submitted("run", 2))
    story.tell(Queued("there is no room for 2 workers"))
    story.now_s += 30.0
    story.end("stopped", 0.0)
    account = report(story)
    assert (account.queued_s, account.elapsed_s, account.workers.held) == (30.0, 0.0, 0.0)


def test_time_is_split_by_records_and_events() -> None:
    account = report(eventful())
    assert known_seconds(account) == pytest.approx(account.elapsed_s)
    seconds = {spent.use: spent.seconds for spent in account.time}
    assert seconds[Use.COMPUTE] == pytest.approx(0.7 * 200) and seconds[Use.COMMUNICATION] == pytest.approx(0.2 * 200)
    assert seconds[Use.DATA_WAIT] == pytest.approx(10.0) and seconds[Use.PROTECTION] == pytest.approx(10.0)
    assert seconds[Use.START] == pytest.approx(16.0) and seconds[Use.END] == pytest.approx(0.4)
    assert seconds[Use.DETECT] == pytest.approx(0.1)
    assert seconds[Use.TRANSFER] == pytest.approx(0.1) and seconds[Use.REBUILD] == pytest.approx(0.1)
    assert seconds[Use.RENDEZVOUS] == pytest.approx(0.25 + 0.3 - 0.2)
    assert seconds[Use.WASTED] == 0.0 and all(spent.note == "" for spent in account.time)
    assert account.goodput == pytest.approx(0.9 * 200 / account.elapsed_s)
    transitions = [(m.kind, m.from_size, m.to_size, m.step) for m in account.transitions]
    assert transitions == [("recovery", 3, 2, 60), ("rescale", 2, 3, 100)]
    assert [m.total_s for m in account.transitions] == [pytest.approx(0.35), pytest.approx(0.3)]


def test_parts_that_an_older_journal_lacks_are_not_measured() -> None:
    story = Story()
    story.start(2)
    story.train(5, communication_wait_s=None)
    story.now_s += 0.5
    story.spawn(1)
    story.activate(3)  # without what the move took
    story.train(5, communication_wait_s=None)
    story.end("succeeded")
    account = report(story)
    spent = {part.use: part for part in account.time}
    assert spent[Use.COMMUNICATION].seconds is None and spent[Use.COMMUNICATION].note == "in compute"
    assert spent[Use.TRANSFER].seconds is spent[Use.REBUILD].seconds is None
    assert spent[Use.RENDEZVOUS].seconds == pytest.approx(0.5) and spent[Use.REBUILD].note == "in rendezvous"
    assert known_seconds(account) == pytest.approx(account.elapsed_s)
    story.events.pop()
    story.rescale(2)
    story.train(10)
    mixed = {part.use: part for part in report(story).time}
    assert mixed[Use.COMMUNICATION].seconds == pytest.approx(2.0)
    assert mixed[Use.COMMUNICATION].note == "of 10 of 20 steps; that of the others is in compute"
    assert mixed[Use.TRANSFER].note == "of 1 of 2 transitions; that of the others is in rendezvous"


def test_steps_that_were_done_again_are_wasted_and_counted_once() -> None:
    story = Story()
    story.start(2)
    story.train(10)
    story.end("failed")
    story.resume(2, after_s=30.0, step=5)
    story.train(6)
    story.end("succeeded")
    account = report(story)
    assert (account.steps, account.wasted_steps, account.tokens, account.wasted_tokens) == (12, 4, 1200, 400)
    assert account.seconds(Use.WASTED) == pytest.approx(4.0)
    assert (account.paused_s, account.down_s) == (0.0, pytest.approx(30.0))
    assert known_seconds(account) == pytest.approx(account.elapsed_s)
    assert account.loss == pytest.approx(4.0 - 0.11)


def test_a_checkpoint_behind_the_newest_record_wastes_the_steps_up_to_it() -> None:
    story = Story()
    story.start(2)
    story.train(10)
    story.now_s += 0.2
    story.tell(GenerationAborted(0, 9, "both died"))
    story.tell(RolledBack(4, "/x", "both died"))
    story.now_s += 12.0
    story.activate(2, **MOVE)
    story.now_s += 5.0  # steps 5 to 9 once more: their records are known
    story.train(3)
    story.end("succeeded")
    account = report(story)
    assert account.seconds(Use.WASTED) == pytest.approx(5.0) and account.seconds(Use.DETECT) == pytest.approx(0.2)
    assert account.seconds(Use.RENDEZVOUS) == pytest.approx(12.0 - 0.1) and known_seconds(account) == pytest.approx(
        account.elapsed_s
    )


def test_an_update_that_was_left_out_is_wasted() -> None:
    story = Story()
    story.start(1)
    story.train(3)
    story.train(1, applied=False)
    story.end("succeeded")
    account = report(story)
    assert (account.steps, account.wasted_steps, account.tokens) == (3, 1, 300) and account.seconds(Use.WASTED) == 1.0


def test_the_report_of_an_active_run_ends_at_its_newest_entry() -> None:
    story = Story()
    story.start(2)
    story.train(10)
    account = report(story)
    assert account.outcome == "" and account.elapsed_s == pytest.approx(18.0) and account.steps == 10
    assert account.workers.members == pytest.approx(20 / 3600) and account.workers.reconciles


def test_a_cluster_that_was_lost_is_counted_to_its_last_sign_of_life() -> None:
    story = Story()
    story.start(2)
    story.train(10)
    story.resume(2, after_s=3600.0)
    story.train(10)
    story.end("succeeded")
    account = report(story)
    assert account.down_s == pytest.approx(3600.0) and [span.outcome for span in account.attempts] == ["", "succeeded"]
    assert account.workers.members == pytest.approx((20 + 20 + 0.4) / 3600)


def test_a_run_that_never_trained_has_no_goodput_but_hours() -> None:
    story = Story()
    story.tell(Submitted("run", 2))
    story.spawn(2)
    story.now_s += 36.0
    story.end("failed", after_s=0.0)
    account = report(story, Rates(cost_per_worker_hour=10.0))
    assert (account.goodput, account.steps, account.loss, account.workers.members) == (0.0, 0, None, 0.0)
    assert (
        account.workers.held == pytest.approx(0.02)
        and account.workers.difference is None
        and account.workers.reconciles
    )
    assert account.cost.total == pytest.approx(0.2) and account.cost.per_million_tokens is None
    assert account.seconds(Use.START) == pytest.approx(36.0)


def test_time_without_a_next_world_counts_as_waiting() -> None:
    story = Story()
    story.start(2)
    story.train(4)
    story.now_s += 0.5
    story.tell(GenerationAborted(0, 3, "w1 died"))
    story.now_s += 60.0
    story.end("failed", after_s=0.0)
    account = report(story)
    assert account.seconds(Use.DETECT) == pytest.approx(0.5) and account.seconds(Use.RENDEZVOUS) == pytest.approx(60.0)
    assert account.seconds(Use.END) == 0.0


def test_an_empty_journal_is_no_report() -> None:
    with pytest.raises(NotFinished, match="holds no event yet"):
        report_of("run", [])


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["cost_per_worker_hour", "watts_per_worker"])
def test_rates_that_are_none_are_refused(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=r"it must be a number of 0 or more.*Give --cost.*Nothing was written"):
        Rates(**{name: value})


def test_money_and_energy_only_where_a_rate_is_given() -> None:
    plain = report(eventful())
    assert plain.cost.total is plain.cost.per_million_tokens is None
    assert plain.energy == () and plain.energy_note.startswith("not measured")
    account = report(eventful(), Rates(cost_per_worker_hour=3.0, watts_per_worker=250.0))
    assert account.cost.total == pytest.approx(3.0 * account.workers.held)
    assert account.cost.per_million_tokens == pytest.approx(account.cost.total / 20_000 * 1e6)  # type: ignore[operator]
    (model,) = account.energy
    assert (model.method, account.energy_note) == (EnergyMethod.MODEL, "")
    assert model.kwh == pytest.approx(0.25 * account.workers.held)
    assert model.note == "not measured: 250 W per worker x worker-hours held"


def test_operations_follow_from_active_parameters_and_tokens() -> None:
    model = {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "head_dim": 32,
    }
    job = JobSpec.model_validate({"schema": "v1", "name": "try", "model": model, "train": {"sequence_length": 64}})
    experts = [ParamSpec(f"experts.{expert}", (1000,), expert) for expert in range(8)]
    params = [ParamSpec("embedding.weight", (5000,), None), ParamSpec("head", (5000,), None), *experts]
    size = size_of(job, params)
    assert (size.parameters, size.active_parameters) == (18_000, 5000 + 2 * 1000)
    story = Story()
    story.start(1)
    story.train(3)
    story.train(1, sequence_length=128)
    flops = report(story, size=size).flops
    assert flops is not None and flops.parameters == 6 * 7000 * 400
    assert flops.attention == 12 * 4 * 4 * 32 * (64 * 300 + 128 * 100)
    leaving = job.model_copy(update={"model": job.model.model_copy(update={"exits": ExitsSpec(layers=(1, 2))})})
    assert size_of(leaving, params).active_parameters == 3 * 5000 + 2 * 1000
    own = job.model_copy(update={"model": job.model.model_copy(update={"entrypoint": "a.b:c"})})
    assert size_of(own, params).active_parameters == 12_000 and size_of(own, params).attention is None
    without = report(story, size=EMPTY).flops
    assert without is not None and without.attention is None


ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("train"), st.integers(1, 6), st.floats(0.01, 5.0), st.floats(0.0, 1.0)),
        st.tuples(st.just("rescale"), st.integers(1, 5), st.floats(0.0, 2.0)),
        st.tuples(st.just("kill"), st.floats(0.0, 4.0), st.floats(0.0, 4.0)),
        st.tuples(st.just("pause"), st.integers(1, 5), st.floats(0.0, 900.0)),
    ),
    max_size=12,
)


@given(acts=ACTS, skew_s=st.floats(-1.0, 1.0), longer=st.floats(0.1, 3.0))
def test_parts_add_up_to_the_whole_whatever_happens(
    acts: list[tuple[str, int, float, float]], skew_s: float, longer: float
) -> None:
    """Also where workers' clocks differ from the controller's, and steps say that they took longer than they can."""
    story = Story()
    story.start(2)
    for what, *amounts in acts:
        if what == "train":
            story.train(int(amounts[0]), amounts[1], between_s=amounts[2])
        elif what == "rescale":
            story.rescale(int(amounts[0]), stall_s=amounts[1])
        elif what == "kill" and len(story.members) > 1:
            story.kill(*amounts)  # type: ignore[arg-type]
        elif what == "pause":
            story.end("paused")
            story.resume(int(amounts[0]), after_s=amounts[1])
    for number, entry in enumerate(story.events):
        if isinstance(entry.event, StepsCommitted):
            odd = (
                changed(r, vote_time=r.timing.vote_time + skew_s, step_s=r.timing.step_s * longer)
                for r in entry.event.records
            )
            story.events[number] = replace(entry, event=StepsCommitted(tuple(odd)))
    account = report(story)
    assert known_seconds(account) == pytest.approx(account.elapsed_s)
    assert all(spent.seconds is None or spent.seconds >= 0.0 for spent in account.time)
    assert account.goodput is None or 0.0 <= account.goodput <= 1.0
    assert sum(each.total_s for each in account.transitions) <= account.elapsed_s + 1e-6
    assert account.workers.held >= account.workers.members - 1e-9
    assert account.tokens + account.wasted_tokens == 100 * (account.steps + account.wasted_steps)
