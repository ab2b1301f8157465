"""A key that is set from outside changes nothing else of the job, and its text needs no quotes."""

from typing import Any

import pytest

from orchestrator.errors import SpecError
from orchestrator.spec.job_file.loading import parse_job
from orchestrator.spec.job_file.overrides import Setting

HEAD = "schema: v1\nname: try\n"


@pytest.mark.parametrize(
    ("short", "override", "long"),
    [
        ("workers: 1..4", "workers.standby=1", "workers: {min: 1, max: 4, standby: 1}"),
        ("workers: 2", "workers.max=3", "workers: {min: 2, max: 3}"),
        (
            "communication: {compression: powersgd}",
            "communication.compression.share=0.1",
            "communication: {compression: {scheme: powersgd, share: 0.1}}",
        ),
        ("data: {source: a}\ntask: dpo", "task.beta=0.3", "data: {source: a}\ntask: {name: dpo, beta: 0.3}"),
        ("workers: null", "workers.max=3", "workers: {max: 3}"),
    ],
)
def test_a_key_below_a_short_form_is_added_to_what_that_means(short: str, override: str, long: str) -> None:
    assert parse_job(HEAD + short, "job.yaml", [override]) == parse_job(HEAD + long)


def test_a_setting_of_a_caller_keeps_a_short_form_too() -> None:
    job = parse_job(f"{HEAD}workers: 1..4", "job.yaml", [Setting(("workers", "label_selector"), {"pool": "a"}, "it")])
    assert (job.workers.min, job.workers.max, job.workers.label_selector) == (1, 4, {"pool": "a"})


@pytest.mark.parametrize(
    ("text", "override", "problem"),
    [
        ("workers: many", "workers.max=3", 'job.yaml:3:1: workers: must be a mapping, since --set workers.max=3 sets '
         'a key in it; got "many"; write it as one, or set workers as a whole'),
        ("train: {optimizer: adamw}", "train.optimizer.eps=1e-6", "job.yaml:3:9: train.optimizer: must be a mapping"),
        ("workers: {schedule: [{at_step: 3, workers: 2}]}", "workers.schedule.0.at_step=4", "set workers.schedule as"),
        ("task: {entrypoint: a:b, options: {x: 5}}", "task.options.x.y=1", "got 5; write it as one"),
    ],
)  # fmt: skip
def test_a_value_that_can_hold_no_key_is_refused_not_replaced(text: str, override: str, problem: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_job(HEAD + text, "job.yaml", [override])
    (found,) = caught.value.problems
    assert problem in str(found)


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("name=on", ("name",), "on"),
        ("name='on'", ("name",), "on"),
        ("envs.DEBUG=1", ("envs", "DEBUG"), "1"),
        ("envs.DEBUG=", ("envs", "DEBUG"), ""),
        ("envs.DEBUG=null", ("envs", "DEBUG"), "null"),
        ("envs.FLAGS=a: b # c", ("envs", "FLAGS"), "a: b # c"),
        ('envs.FLAGS="1"', ("envs", "FLAGS"), "1"),
        ("workers.label_selector.gpu=true", ("workers", "label_selector", "gpu"), "true"),
        ("tracking.register_as=007", ("tracking", "register_as"), "007"),
        ("tracking.alias=null", ("tracking", "alias"), None),
        ("tracking.experiment=2024", ("tracking", "experiment"), "2024"),
        ("storage=", ("storage",), "./runs"),
        ("task.options.x=1", ("task", "options", "x"), 1),
    ],
)
def test_text_is_taken_as_it_is_where_only_text_is_possible(override: str, path: tuple[str, ...], value: Any) -> None:
    found: Any = parse_job(f"{HEAD}task: {{entrypoint: a:b}}\n" if path[0] == "task" else HEAD, "", [override])
    for key in path:
        found = found[key] if isinstance(found, dict) else getattr(found, key)
    assert found == value


@pytest.mark.parametrize("override", ["name=\udcff", "envs.A=a\x1b"])
def test_text_that_can_not_be_printed_is_refused(override: str) -> None:
    with pytest.raises(SpecError, match="must be printable text"):
        parse_job(HEAD, "job.yaml", [override])
