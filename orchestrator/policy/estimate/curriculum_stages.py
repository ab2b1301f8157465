"""Stages of a curriculum and their first steps, as far as they follow from the job and its corpus."""

from collections.abc import Callable, Iterator, Sequence

from orchestrator.errors import DataError
from orchestrator.protocol.messages import StageStart
from orchestrator.sampling.chunks import Chunks
from orchestrator.sampling.curriculum import Admission, BegunStage, Curriculum, CurriculumState
from orchestrator.spec.curriculum import CurriculumSpec, StageSpec
from orchestrator.spec.train import TrainSpec


def planned_stages(
    spec: CurriculumSpec,
    train: TrainSpec,
    chunks: Chunks,
    decided: Sequence[StageStart] = (),
    begun: Sequence[BegunStage] = (),
    by_document: bool = False,
) -> CurriculumState:
    """The run's stages with their first steps.

    Args:
        decided: stages that begin earlier than in the job's order, or other stages than there, ascending. The job's
            later stages follow them.
        begun: stages that can't be changed any more; decided ones begin after the first step of the last of them.
        by_document: a row is a document, or a piece of a long one.

    Raises:
        DataError: a stage admits no document at first; or with `on_exhausted: fail` and nothing decided, too few for
            its length. It is named.
        ValueError: a decided stage that the job doesn't have.
    """
    for stage in spec.stages:
        _check_admits(stage, chunks)
    names, ahead = [stage.name for stage in spec.stages], list(decided)
    known = list(begun)

    def walk() -> Curriculum:
        """The curriculum through the stages known so far."""
        rows = train.global_batch_size
        return Curriculum(chunks, CurriculumState(train.seed, rows, chunks.num_tokens, tuple(known), by_document))

    number, first_step = (names.index(known[-1].name), known.pop().first_step) if known else (0, 0)
    while number < len(spec.stages) and first_step < train.max_steps:
        stage, is_last = spec.stages[number], number == len(spec.stages) - 1
        length = stage.sequence_length or train.sequence_length
        known.append(BegunStage(stage.name, first_step, length, _admission(stage)))
        end = (
            train.max_steps if is_last else min(train.max_steps, _natural_end(stage, known[-1], walk, train.max_steps))
        )
        fails = spec.on_exhausted == "fail" and not decided and not begun
        if fails or (spec.on_exhausted == "next" and not is_last):
            exhausted = _exhausted_at(walk(), known[-1], end)
            if exhausted < end and fails:
                raise _too_little(stage, exhausted - first_step, end - first_step)
            end = end if exhausted == end else max(exhausted, first_step + 1)
        while ahead and (ahead[0].first_step <= first_step or _is_void(ahead[0], stage.name, end)):
            ahead.pop(0)
        if ahead and ahead[0].first_step <= end:
            start = ahead.pop(0)
            number, first_step = names.index(start.name), start.first_step
        else:
            number, first_step = number + 1, end
    return walk().state


def continued(
    present: CurriculumState,
    first_step: int,
    spec: CurriculumSpec,
    train: TrainSpec,
    chunks: Chunks,
    decided: Sequence[StageStart],
) -> CurriculumState:
    """The plan that trains on the same tokens as `present` before `first_step` and follows the decided stages from
    there on; those decided for earlier steps are too late. Raises as `planned_stages`."""
    begun = [stage for stage in present.stages if stage.first_step < first_step]
    ahead = [s for s in decided if s.first_step >= first_step]
    return planned_stages(spec, train, chunks, ahead, begun, present.by_document)


def longest_row(spec: CurriculumSpec, train: TrainSpec) -> int:
    """Tokens of the longest row of any stage."""
    return max(stage.sequence_length or train.sequence_length for stage in spec.stages)


def _admission(stage: StageSpec) -> Admission:
    low, high = stage.difficulty
    if stage.pace is None:
        return Admission(low, high)
    pace = stage.pace
    return Admission(low, high, pace.kind, pace.start, pace.steps, pace.jumps, pace.hardest_first)


def _natural_end(stage: StageSpec, begun: BegunStage, walk: Callable[[], Curriculum], num_steps: int) -> int:
    """The step after the stage's last one, unless another stage is decided."""
    assert stage.until is not None
    if stage.until.steps is not None:
        return begun.first_step + stage.until.steps
    if stage.until.max_steps is not None:
        return begun.first_step + stage.until.max_steps
    assert stage.until.tokens is not None
    curriculum, tokens, step = walk(), stage.until.tokens, begun.first_step
    if not curriculum.state.by_document:
        return step - (-tokens // curriculum.state.step_units(step))
    while tokens > 0 and step < num_steps:
        tokens -= curriculum.spans(step).num_tokens
        step += 1
    return step


def _is_void(start: StageStart, present: str, end: int) -> bool:
    """Whether it was to end another stage than the one it would begin in."""
    return start.first_step <= end and start.after not in ("", present)


def _check_admits(stage: StageSpec, chunks: Chunks) -> None:
    low, high = _admission(stage).at(0)
    if not ((chunks.difficulty >= low) & (chunks.difficulty < high)).any():
        raise DataError(
            f"stage {stage.name} selects nothing at first: no document's difficulty lies from {low:.9g} to {high:.9g}",
            remedy="Widen its difficulty, or begin its pace with more (start); a corpus of few or very long documents "
            "has few difficulties.",
            unchanged="Nothing was started.",
        )


def _too_little(stage: StageSpec, done: int, wanted: int) -> DataError:
    return DataError(
        f"stage {stage.name} admits too little: after {done} of its {wanted} steps nothing is left of it in the epoch",
        remedy="Widen its difficulty, end it earlier (until), add text, or set on_exhausted to relax or next.",
        unchanged="Nothing was started.",
    )


def _exhausted_at(curriculum: Curriculum, stage: BegunStage, end: int) -> int:
    """The first step before `end` for which the stage admits too little data; `end` if there is none."""
    for step, until in _constant(stage, end):
        left = curriculum.steps_left(step)
        if step + left < until:
            return step + left
    return end


def _constant(stage: BegunStage, end: int) -> Iterator[tuple[int, int]]:
    """Stretches [step, until) of a stage with constant admission."""
    step = stage.first_step
    while step < end:
        change = stage.admission.next_change(step - stage.first_step)
        until = end if change is None else min(end, stage.first_step + change)
        yield step, until
        step = until
