"""The `curriculum` section: the order of a run's documents, by difficulty."""

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from orchestrator.spec.keys.section import HERE, Broken, CodeDir, Path, Section, refuse
from orchestrator.spec.moe.experts import ExpertNumber, ScheduledExperts
from orchestrator.spec.workers import MANUAL, STAGE, AutoscaleSpec, Range, WorkersSpec

SIGNALS = ("length", "compression", "rarity", "diversity", "reference_loss")
Share = Annotated[float, Field(ge=0, le=1)]


def _signal(signal: str) -> str:
    if signal not in SIGNALS and not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", signal):
        raise refuse(f"must be {', '.join(SIGNALS)} or a function as package.module:score")
    return signal


def _range(difficulty: tuple[float, float]) -> tuple[float, float]:
    if difficulty[0] >= difficulty[1]:
        raise refuse("must be two shares, the lower one first, as in [0, 0.4]")
    return difficulty


class PaceSpec(Section):
    """How a stage's range of difficulties opens."""

    kind: Literal["linear", "root", "step"] = Field(
        default="root",
        description="linear; root: by the square root of the step, so that each step adds as much as it can train on "
        "(Platanis et al., 2019); step: in equal jumps.",
    )
    start: float = Field(default=0.1, gt=0, le=1, description="The share of the range that is open at first.")
    steps: int = Field(ge=1, description="Steps until the whole range is open.")
    jumps: int = Field(default=3, ge=1, description="Number of jumps, for kind step.")
    hardest_first: bool = Field(
        default=False, description="true: open from the difficult end (an anti-curriculum), for comparison."
    )


class UntilSpec(Section):
    """The end of a stage; exactly one of these conditions."""

    steps: int | None = Field(default=None, ge=1, description="After this many steps.")
    tokens: int | None = Field(default=None, ge=1, description="After the step that reaches this many trained tokens.")
    validation_below: float | None = Field(
        default=None, gt=0, description="Some steps after a validation loss below this; max_steps at the latest."
    )
    plateau: int | None = Field(
        default=None,
        ge=1,
        description="Some steps after this many validations in a row that were not 0.5 % better than the best one "
        "before; max_steps at the latest.",
    )
    max_steps: int | None = Field(
        default=None, ge=1, description="With validation_below and plateau: after this many steps in any case."
    )

    def broken_rules(self) -> Iterator[Broken]:
        ends = ("steps", "tokens", "validation_below", "plateau")
        named = [end for end in ends if getattr(self, end) is not None]
        if len(named) != 1:
            yield Broken(tuple((end,) for end in named or ends), f"a stage ends by one of {', '.join(ends)}: name one")
            return
        watched = named[0] in ends[2:]
        if watched and self.max_steps is None:
            rule = f"{named[0]} may never come: name max_steps, after which the stage ends in any case"
            yield Broken((("max_steps",), (named[0],)), rule)
        if not watched and self.max_steps is not None:
            yield Broken((("max_steps",), (named[0],)), f"max_steps has no meaning with {named[0]}: leave it out")


class StageSpec(Section):
    """A stage: the documents that it admits, and how it trains on them."""

    name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,39}$", description="Its name: up to 40 of a-z, 0-9 and -.")
    difficulty: Annotated[tuple[Share, Share], AfterValidator(_range)] = Field(
        default=(0.0, 1.0),
        description="Admitted documents, as shares of the corpus's tokens from the easiest on: [0, 0.4] are the "
        "easiest two fifths.",
    )
    pace: PaceSpec | None = Field(
        default=None, description="How the range opens while the stage lasts. null: all of it is open at once."
    )
    sequence_length: int | None = Field(default=None, ge=1, description="Tokens of a row. null: train.sequence_length.")
    workers: Range | None = Field(
        default=None,
        description='Number of workers for the stage, as in "2..4"; needs an autoscale.policy. null: as the policy '
        "decides.",
    )
    experts: ExpertNumber | None = Field(
        default=None,
        description="Number of routed experts from the stage's first step on, and how it is reached. Stages before end "
        "by steps then. null: as before.",
    )
    until: UntilSpec | None = Field(
        default=None, description="When it ends. null, for the last one only: with the run."
    )


class CurriculumSpec(Section):
    """Stages of difficulty. Each document is used once per epoch, by whichever stage."""

    signal: Annotated[str, AfterValidator(_signal)] = Field(
        default="rarity",
        description="Measure of a document's difficulty: length (tokens), compression (bytes after zlib over bytes "
        "before), rarity (mean surprisal of its tokens by their frequency), diversity (distinct tokens in windows of "
        "50), reference_loss (mean loss of its tokens under a bigram model of the training split without it), or a "
        "function of your own, package.module:score, from its text to a number.",
    )
    code_dir: CodeDir = Field(
        default=HERE,
        description="Directory from which your function is imported, sent with the job; relative to the current one.",
    )
    on_exhausted: Literal["next", "relax", "fail"] = Field(
        default="relax",
        description="If no admitted documents are left in the epoch: next begins the next stage, relax admits the rest "
        "of the epoch, fail refuses the job before it starts.",
    )
    stages: tuple[StageSpec, ...] = Field(description="In their order; at least one.")

    def broken_rules(self) -> Iterator[Broken]:
        if not self.stages:
            yield Broken((("stages",),), "a curriculum needs at least one stage; got none")
            return
        if self.code_dir != HERE and ":" not in self.signal:
            rule = "code_dir has a meaning with a signal of your own only; remove it"
            yield Broken((("code_dir",), ("signal",)), rule)
        for i, stage in enumerate(self.stages):
            if stage.name == "next":
                rule = "no stage is called next: the name refers to the stage after the current one"
                yield Broken((("stages", i, "name"),), rule)
            if stage.name in [earlier.name for earlier in self.stages[:i]]:
                yield Broken((("stages", i, "name"),), f"names of stages are distinct; {stage.name} is there twice")
        for i, (stage, _) in enumerate(pairwise(self.stages)):
            if stage.until is None:
                rule = f"every stage but the last needs an end: set until of {stage.name}"
                yield Broken((("stages", i, "until"), ("stages", i, "name")), rule)
        if self.stages[-1].until is not None:
            last = len(self.stages) - 1
            rule = (
                f"the last stage lasts as long as the run (train.max_steps): leave until of {self.stages[-1].name} out"
            )
            yield Broken((("stages", last, "until"),), rule)


def first_steps(curriculum: CurriculumSpec | None) -> dict[int, int]:
    """First steps of the stages, by index, which follow from the job: of the first one, and of each other if those
    before it end by steps and don't end earlier."""
    found, step = {}, 0
    for i, stage in enumerate(curriculum.stages if curriculum else ()):
        found[i] = step
        if stage.until is None or stage.until.steps is None or curriculum is None or curriculum.on_exhausted == "next":
            break
        step += stage.until.steps
    return found


def experts_by_stage(curriculum: CurriculumSpec | None) -> dict[int, ScheduledExperts]:
    """Changes of the number of experts with stages, by index of the stage, of those whose first step is known."""
    stages = curriculum.stages if curriculum else ()
    return {
        i: ScheduledExperts(at_step=step, **experts.model_dump(exclude_unset=True))
        for i, step in first_steps(curriculum).items()
        if i > 0 and (experts := stages[i].experts) is not None
    }


def broken_experts(curriculum: CurriculumSpec | None, has_schedule: bool) -> Iterator[Broken]:
    """Rules between stages with experts and other keys.

    Args:
        has_schedule: whether the job has an `experts.schedule`.
    """
    known = first_steps(curriculum)
    for i, stage in enumerate(curriculum.stages if curriculum else ()):
        key: Path = ("curriculum", "stages", i, "experts")
        if stage.experts is None:
            continue
        if has_schedule:
            rule = "experts.schedule and stages with experts both decide the number of experts: leave one out"
            yield Broken((("experts", "schedule"), key), rule)
        if i == 0:
            rule = f"experts of {stage.name}, the first stage, are model.n_routed_experts: leave them out"
            yield Broken((key, ("model", "n_routed_experts")), rule)
        elif i not in known:
            rule = (
                f"a number of experts changes at a known step, so the stages before {stage.name} must end by "
                "until.steps, and on_exhausted must not be next"
            )
            yield Broken((key, ("curriculum", "on_exhausted")), rule)


def broken_sizes(workers: WorkersSpec, autoscale: AutoscaleSpec, curriculum: CurriculumSpec | None) -> Iterator[Broken]:
    """Rules between the settings that decide the number of workers."""
    policy, stages = autoscale.policy, curriculum.stages if curriculum else ()
    named = [(i, stage.name, stage.workers) for i, stage in enumerate(stages) if stage.workers is not None]
    for i, name, wanted in named:
        key: Path = ("curriculum", "stages", i, "workers")
        if not workers.min <= wanted.min <= wanted.max <= workers.max:
            rule = f"workers of a stage must be within workers.min..max ({workers.min}..{workers.max}); got "
            yield Broken((key, ("workers", "min"), ("workers", "max")), f"{rule}{wanted.min}..{wanted.max} in {name}")
        elif i == 0 and not wanted.min <= workers.initial <= wanted.max:
            rule = f"workers.initial must be within the workers of the first stage ({wanted.min}..{wanted.max})"
            yield Broken((("workers", "initial"), key), f"{rule}; got {workers.initial}")
        if policy == MANUAL:
            rule = f"workers of stage {name} need autoscale.policy {STAGE}, available or throughput; got {MANUAL}"
            yield Broken((("autoscale", "policy"), key), rule)
    if policy == MANUAL:
        return
    if policy == STAGE and not named:
        rule = f"autoscale.policy {STAGE} needs a stage of the curriculum that names its workers; none does"
        yield Broken((("autoscale", "policy"), ("curriculum",)), rule)
    if workers.schedule:
        rule = f"workers.schedule and autoscale.policy {policy} both decide the number of workers: leave one out"
        yield Broken((("autoscale", "policy"), ("workers", "schedule")), rule)
    if workers.min == workers.max:
        rule = f"autoscale.policy {policy} needs room: workers.max must be more than min; both are {workers.min}"
        yield Broken((("workers", "max"), ("autoscale", "policy")), rule)
