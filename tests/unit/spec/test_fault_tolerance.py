"""Intervals of snapshots and of checkpoints, and their defaults."""

import pytest

from orchestrator.errors import SpecError
from orchestrator.spec.fault_tolerance import MAX_UNPUBLISHED, ProtectionSpec
from orchestrator.spec.job_file.loading import parse_job

HEAD = "schema: v1\nname: try\n"


def test_a_job_without_settings_is_safe() -> None:
    job = parse_job(HEAD)
    assert (job.checkpoint.every, job.checkpoint.keep_last, job.protection.every, job.train.lr) == ("auto", 3, 1, 3e-4)


@pytest.mark.parametrize(
    ("every", "interval", "whole_every"), [(1, 1, 4), (7, 7, 1), ("auto", 1, 4), ("none", None, 1)]
)
def test_snapshots(every: int | str, interval: int | None, whole_every: int) -> None:
    protection = ProtectionSpec(every=every)
    assert (protection.interval, protection.whole_every(4)) == (interval, whole_every)


@pytest.mark.parametrize("section", ["protection", "checkpoint"])
@pytest.mark.parametrize(("word", "value"), [("none", "none"), ("auto", "auto"), ("9", 9)])
def test_the_command_line_takes_plain_words(section: str, word: str, value: int | str) -> None:
    job = parse_job(HEAD, overrides=[f"{section}.every={word}", "train.precision=bf16"])
    assert getattr(job, section).every == value and job.train.precision == "bf16"


@pytest.mark.parametrize("section", ["protection", "checkpoint"])
@pytest.mark.parametrize("value", ["0", "1.5", "true", "null", "every_step", '"9"'])
def test_intervals_that_make_no_sense(section: str, value: str) -> None:
    with pytest.raises(
        SpecError, match=rf"3:\d+: {section}.every: must be a number of steps, at least 1, auto or none"
    ):
        parse_job(f"{HEAD}{section}: {{every: {value}}}\n")


@pytest.mark.parametrize("value", ["every_step", "every 4", "auto", '"off"', "false"])
def test_protection_as_it_was_written_before_is_refused_with_the_present_form(value: str) -> None:
    with pytest.raises(SpecError, match=r"3:1: protection: must be a mapping: \{every: N\}"):
        parse_job(f"{HEAD}protection: {value}\n")


@pytest.mark.parametrize("value", ["all", "true", "null", "1"])
def test_what_may_be_published(value: str) -> None:
    assert parse_job(HEAD).protection.publish == "finished"
    assert parse_job(f"{HEAD}protection: {{publish: committed}}\n").protection.publish == "committed"
    with pytest.raises(SpecError, match=r"3:\d+: protection.publish: must be .*finished.*committed"):
        parse_job(f"{HEAD}protection: {{publish: {value}}}\n")


@pytest.mark.parametrize(
    ("every", "steps", "is_refused"),
    [
        ("auto", 5000, False),
        (MAX_UNPUBLISHED, 5000, False),
        (MAX_UNPUBLISHED + 1, 5000, True),
        ("none", 5000, True),
        ("none", MAX_UNPUBLISHED, False),
    ],
)
def test_steps_do_not_wait_for_ever_for_a_checkpoint(every: int | str, steps: int, is_refused: bool) -> None:
    text = f"{HEAD}train: {{max_steps: {steps}}}\ncheckpoint: {{every: {every}}}\n"
    parse_job(f"{text}protection: {{publish: finished}}\n")
    text += "protection: {publish: committed}\n"
    if not is_refused:
        parse_job(text)
        return
    with pytest.raises(
        SpecError, match=rf"checkpoint.every: .*must be at most {MAX_UNPUBLISHED}, or auto.*; got {every}"
    ):
        parse_job(text)


@pytest.mark.parametrize(
    ("copies", "rule"),
    [
        ("{copies: 2}", None),
        ("{copies: 3}", "protection.copies: must be"),
        ("{copies: 0}", "protection.copies: must be"),
        ("{copies: true}", "protection.copies: must be"),
        ("{copies: 2, every: none}", "protection.copies: .*protection.copies 2 needs snapshots.*; got none"),
    ],
)
def test_copies_of_snapshots(copies: str, rule: str | None) -> None:
    text = f"{HEAD}workers: {{min: 3, max: 4}}\nprotection: {copies}\n"
    if rule is None:
        assert parse_job(text).protection.copies == 2
        return
    with pytest.raises(SpecError, match=rule):
        parse_job(text)


def test_two_copies_need_three_workers() -> None:
    with pytest.raises(
        SpecError, match=r"copies 2 needs at least 3 workers: raise workers.min, or .* got workers.min 2"
    ):
        parse_job(f"{HEAD}workers: {{min: 2, max: 4}}\nprotection: {{copies: 2}}\n")
