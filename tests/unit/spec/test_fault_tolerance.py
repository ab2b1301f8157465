"""Intervals of snapshots and of checkpoints, and their defaults."""

import pytest

from orchestrator.errors import SpecError
from orchestrator.spec.fault_tolerance import ProtectionSpec
from orchestrator.spec.loading import parse_job

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
