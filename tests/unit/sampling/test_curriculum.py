"""The order of tokens under a curriculum: against a plain walk, token by token."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import ProtocolError
from orchestrator.sampling.chunks import Chunks, Spans
from orchestrator.sampling.curriculum import Admission, BegunStage, Curriculum, CurriculumState
from orchestrator.sampling.permutation import mixed


def _tokens(spans: Spans) -> list[int]:
    return [token for start, n in zip(spans.start, spans.length, strict=True) for token in range(start, start + n)]


def _chunks(lengths: list[int], scores: list[float], max_length: int = 5) -> Chunks:
    return Chunks.of(np.array(lengths), np.array(scores), max_length)


def plain_walk(chunks: Chunks, state: CurriculumState) -> Iterator[list[int]]:
    """Tokens of one step after the other: of what is admitted and left, the first token of the first chunk."""
    epoch, left, relaxed, admitting, step = -1, list[list[int]](), False, (0.0, 0.0), 0
    order: list[int] = []

    def begin_epoch() -> None:
        nonlocal epoch, left, order
        epoch += 1
        left = [list(range(s, s + n)) for s, n in zip(chunks.start, chunks.length, strict=True)]
        order = sorted(range(len(left)), key=lambda c: int(mixed(state.seed, epoch, chunks.start[c : c + 1])[0]))

    begin_epoch()
    while True:
        stage = state.stage_at(step)
        now = stage.admission.at(step - stage.first_step)
        if now != admitting:
            admitting, relaxed = now, False
        at_once = stage.sequence_length if state.by_document else 1
        taken: list[int] = []
        rows = 0
        while rows < state.global_batch_size * (1 if state.by_document else stage.sequence_length):
            low, high = (0.0, 1.0) if relaxed else admitting
            some = next((c for c in order if left[c] and low <= chunks.difficulty[c] < high), None)
            if some is not None:
                taken += left[some][:at_once]
                del left[some][:at_once]
                rows += 1
            elif relaxed or not any(left):
                begin_epoch()
                relaxed = False
            else:
                relaxed = True
        yield taken
        step += 1


@st.composite
def admissions(draw: st.DrawFn) -> Admission:
    low, high = sorted(draw(st.lists(st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0]), min_size=2, max_size=2, unique=True)))
    pace = draw(st.sampled_from(["none", "linear", "root", "step"]))
    return Admission(
        low, high, pace, draw(st.sampled_from([0.1, 0.5, 1.0])), draw(st.integers(1, 9)), 2, draw(st.booleans())
    )


@st.composite
def orders(draw: st.DrawFn) -> tuple[Chunks, CurriculumState]:
    lengths = draw(st.lists(st.integers(1, 13), min_size=1, max_size=12))
    scores = draw(st.lists(st.integers(0, 4), min_size=len(lengths), max_size=len(lengths)))
    chunks = _chunks(lengths, [float(score) for score in scores])
    firsts = [0, *sorted(draw(st.sets(st.integers(1, 12), max_size=3)))]
    stages = [BegunStage(str(f), f, draw(st.integers(1, 6)), draw(admissions())) for f in firsts]
    seed, rows, by_document = draw(st.integers(0, 9)), draw(st.integers(1, 4)), draw(st.booleans())
    return chunks, CurriculumState(seed, rows, chunks.num_tokens, tuple(stages), by_document)


@settings(deadline=None)
@given(orders())
def test_steps_draw_what_a_plain_walk_draws(order: tuple[Chunks, CurriculumState]) -> None:
    chunks, state = order
    walk, curriculum = plain_walk(chunks, state), Curriculum(chunks, state)
    for step in range(20):
        assert _tokens(curriculum.spans(step)) == next(walk)


@settings(deadline=None)
@given(orders())
def test_a_row_by_document_is_one_chunk_within_its_stages_sequence_length(
    order: tuple[Chunks, CurriculumState],
) -> None:
    chunks, state = order[0], dataclasses.replace(order[1], by_document=True)
    curriculum = Curriculum(chunks, state)
    of_chunk = np.repeat(np.arange(len(chunks.start)), chunks.length)  # chunks are in the order of their tokens
    for step in range(20):
        spans = curriculum.spans(step)
        assert len(spans.start) == state.global_batch_size
        assert spans.length.max() <= state.stage_at(step).sequence_length
        assert (of_chunk[spans.start] == of_chunk[spans.start + spans.length - 1]).all()


@settings(deadline=None)
@given(orders(), st.lists(st.integers(0, 30), min_size=1, max_size=5))
def test_a_step_has_the_same_rows_on_any_rank_and_at_any_time(
    order: tuple[Chunks, CurriculumState], steps: list[int]
) -> None:
    chunks, state = order
    in_order, jumping = Curriculum(chunks, state), Curriculum(chunks, state)
    known = [_tokens(in_order.spans(step)) for step in range(31)]
    for step in steps:
        assert _tokens(jumping.spans(step)) == known[step]


@settings(deadline=None)
@given(orders())
def test_every_epoch_holds_every_token_once_whatever_the_stages(order: tuple[Chunks, CurriculumState]) -> None:
    chunks, state = order
    curriculum, drawn, step = Curriculum(chunks, state), list[int](), 0
    while len(drawn) < 3 * chunks.num_tokens:
        drawn += _tokens(curriculum.spans(step))
        step += 1
    for epoch in range(3):
        of_epoch = drawn[epoch * chunks.num_tokens : (epoch + 1) * chunks.num_tokens]
        assert sorted(of_epoch) == list(range(chunks.num_tokens))


@settings(deadline=None)
@given(orders(), st.integers(0, 12))
def test_a_later_stage_changes_no_earlier_step(order: tuple[Chunks, CurriculumState], step: int) -> None:
    """So a worker that learns of a stage late has trained on the same tokens until then."""
    chunks, state = order
    known = tuple(stage for stage in state.stages if stage.first_step <= step)
    early = Curriculum(chunks, dataclasses.replace(state, stages=known))
    late = Curriculum(chunks, state)
    assert [_tokens(early.spans(s)) for s in range(step + 1)] == [_tokens(late.spans(s)) for s in range(step + 1)]


@settings(deadline=None)
@given(orders(), st.integers(0, 15))
def test_the_steps_that_are_left_draw_only_what_is_admitted_now(
    order: tuple[Chunks, CurriculumState], step: int
) -> None:
    chunks, state = order
    curriculum = Curriculum(chunks, state)
    left = curriculum.steps_left(step)
    stage = state.stage_at(step)
    low, high = stage.admission.at(step - stage.first_step)
    admitted = {
        token
        for start, length, difficulty in zip(chunks.start, chunks.length, chunks.difficulty, strict=True)
        if low <= difficulty < high
        for token in range(start, start + length)
    }
    constant = dataclasses.replace(
        state,
        stages=(
            *(s for s in state.stages if s.first_step < step),
            BegunStage("now", step, stage.sequence_length, Admission(low, high)),
        ),
    )
    going_on = Curriculum(chunks, constant)
    for later in range(step, step + min(left, 40)):
        assert set(_tokens(going_on.spans(later))) <= admitted


def test_easier_documents_come_first_under_a_pace_and_last_under_its_opposite() -> None:
    chunks = _chunks([4] * 100, [float(score) for score in range(100)])
    for hardest_first in (False, True):
        admission = Admission(pace="linear", start=0.1, num_steps=20, hardest_first=hardest_first)
        state = CurriculumState(0, 4, 400, (BegunStage("all", 0, 5, admission),))
        curriculum = Curriculum(chunks, state)
        means = [np.mean(_tokens(curriculum.spans(step))) / 400 for step in range(20)]
        early, late = np.mean(means[:5]), np.mean(means[-5:])
        assert (early > 0.7 and late < 0.45) if hardest_first else (early < 0.3 and late > 0.55)


def test_long_documents_are_cut_and_difficulty_counts_tokens() -> None:
    chunks = _chunks([10, 2, 8], [5.0, 1.0, 3.0], max_length=4)
    assert chunks.start.tolist() == [0, 4, 8, 10, 12, 16]
    assert chunks.length.tolist() == [4, 4, 2, 2, 4, 4]
    assert chunks.difficulty.tolist() == [0.5, 0.5, 0.5, 0.0, 0.1, 0.1]


@pytest.mark.parametrize("scores", [[1.0, float("nan")], [float("inf"), 1.0]])
def test_documents_without_a_score_are_refused(scores: list[float]) -> None:
    with pytest.raises(ValueError, match="has no score"):
        _chunks([3, 3], scores)


@pytest.mark.parametrize(
    "broken", [{"low": 0.5, "high": 0.5}, {"high": 1.1}, {"start": 0.0}, {"pace": "linear", "num_steps": 0}]
)
def test_an_admission_that_cannot_be_is_refused(broken: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        Admission(**broken)  # type: ignore[arg-type]


@given(admissions(), st.integers(0, 12))
def test_the_next_change_is_the_first_one(admission: Admission, step: int) -> None:
    later = [s for s in range(step + 1, step + 40) if admission.at(s) != admission.at(step)]
    assert admission.next_change(step) == (later[0] if later else None)


def test_a_saved_order_is_read_back_and_anything_else_refused() -> None:
    state = CurriculumState(3, 2, 100, (BegunStage("a", 0, 8, Admission(0.0, 0.5)),))
    assert CurriculumState.from_json(state.to_json()) == state
    for text in ("{", "[]", state.to_json().replace('"seed"', '"sead"'), state.to_json().replace("0.5", "-1")):
        with pytest.raises(ProtocolError, match="doesn't fit"):
            CurriculumState.from_json(text)
