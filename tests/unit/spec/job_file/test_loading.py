from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import Problem, SpecError, UsageError
from orchestrator.spec.job import JobSpec
from orchestrator.spec.job_file.loading import MAX_PROBLEMS, job_from, load_job, parse_job
from orchestrator.spec.job_file.overrides import Setting

HEAD = "schema: v1\nname: try\n"


def problems_of(text: str) -> list[Problem]:
    with pytest.raises(SpecError) as caught:
        parse_job(text, "job.yaml")
    return list(caught.value.problems)


def the_problem_of(text: str) -> Problem:
    (problem,) = problems_of(text)
    return problem


def test_shortest_job() -> None:
    assert parse_job(HEAD) == JobSpec(name="try")


def test_quickstart_job(request: pytest.FixtureRequest) -> None:
    job = load_job(request.config.rootpath / "jobs" / "quickstart.yaml")
    assert job.name == "quickstart"
    assert job.workers.schedule


@pytest.mark.parametrize("lr", ["3.0e-3", "3e-3", "0.003", ".003", "3E-3"])
def test_floats_of_all_writings(lr: str) -> None:
    assert parse_job(f"{HEAD}train: {{lr: {lr}}}\n").train.lr == 3e-3


def test_a_float_may_be_written_as_a_whole_number() -> None:
    assert parse_job(f"{HEAD}resources: {{cpus: 2}}\n").resources.cpus == 2.0


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        pytest.param("wokers: 2", "3:1: wokers: unknown key; nearest known key: workers", id="unknown"),
        pytest.param("lr: 1", "3:1: lr: unknown key; nearest known key: train.lr", id="elsewhere"),
        pytest.param("zzz: v1", "3:1: zzz: unknown key; known here: schema, name, work", id="far"),
        pytest.param(
            "train: {stepps: 9}", "3:9: train.stepps: unknown key; nearest known key: train.max_steps", id="deep"
        ),
        pytest.param(
            "workers: {max: 2, schedule: [{at_step: 1, worker: 2, workers: 2}]}",
            "3:43: workers.schedule.0.worker: unknown key; nearest known key: workers.schedule.0.workers",
            id="list",
        ),
        pytest.param(
            "train: {max_steps: 1.5}", "3:9: train.max_steps: must be a whole number; got 1.5", id="float-for-int"
        ),
        pytest.param(
            'train: {max_steps: "5"}', '3:9: train.max_steps: must be a whole number; got "5"', id="text-for-int"
        ),
        pytest.param(
            "train: {max_steps: true}", "3:9: train.max_steps: must be a whole number; got true", id="bool-for-int"
        ),
        pytest.param("train: {lr: fast}", '3:9: train.lr: must be a number; got "fast"', id="text-for-float"),
        pytest.param("train: {lr: 1e999}", "3:9: train.lr: must be a finite number; got Infinity", id="infinite"),
        pytest.param("train:", "3:1: train: must be a mapping; got nothing", id="empty-section"),
        pytest.param("eval: 5", "3:1: eval: must be a mapping; got 5", id="number-for-section"),
        pytest.param("train: {optimizer: {betas: [0.9]}}", "3:21: train.optimizer.betas.1: required", id="short-list"),
        pytest.param(
            "data: {isolate_documents: 1}",
            "3:8: data.isolate_documents: must be true or false; got 1",
            id="int-for-bool",
        ),
        pytest.param(
            "data: {isolate_documents: yes}", "3:27: data.isolate_documents: some YAML readers take", id="yes-for-bool"
        ),
        pytest.param("tracking: {experiment: no}", "3:24: tracking.experiment: some YAML readers", id="no-for-text"),
        pytest.param("envs: {A: 1}", "3:8: envs.A: must be text, in quotes if it looks like", id="number-for-text"),
        pytest.param(
            "curriculum: {signal: rarety, stages: [{name: a}]}",
            "3:14: curriculum.signal: must be length, compression, rarity, diversity, reference_loss or a function",
            id="signal",
        ),
        pytest.param(
            "curriculum: {stages: [{name: a, difficulty: [0.5, 0.2]}]}",
            "3:33: curriculum.stages.0.difficulty: must be two shares, the lower one first",
            id="range",
        ),
        pytest.param(
            "train: {precision: fp16}",
            "3:9: train.precision: must be 'fp32' or 'bf16'; got \"fp16\"",
            id="choice",
        ),
    ],
)
def test_problem_of_one_key(body: str, expected: str) -> None:
    assert str(the_problem_of(f"{HEAD}{body}\n")).startswith(f"job.yaml:{expected}")


@pytest.mark.parametrize(
    ("body", "path", "words"),
    [
        ("model: {num_experts_per_tok: 9}", "model.num_experts_per_tok", "got 9 and 8"),
        (
            "model: {n_routed_experts: 1}",
            "model.n_routed_experts",
            "num_experts_per_tok must be at most n_routed_experts; got 2 and 1",
        ),
        ("model: {num_key_value_heads: 3}", "model.num_key_value_heads", "got 3 and 4"),
        ("model: {first_k_dense_replace: 5}", "model.first_k_dense_replace", "got 5 and 4"),
        ("model: {num_attention_heads: 3, num_key_value_heads: 1}", "model.num_attention_heads", "got 3 and 128"),
        ("model: {hidden_size: 130}", "model.hidden_size", "num_attention_heads must divide hidden_size"),
        ("model: {head_dim: 7}", "model.head_dim", "must be even"),
        ("model: {hidden_size: 12}", "model.hidden_size", "head_dim must be even"),
        ("model: {partial_rotary_factor: 0.3}", "model.partial_rotary_factor", "got 0.3 * 32"),
        ("train: {micro_batch_size: 3}", "train.micro_batch_size", "got 16 and 3"),
        ("train: {max_steps: 5, lr_scheduler: {warmup_steps: 6}}", "train.lr_scheduler.warmup_steps", "got 6 and 5"),
        ("workers: 3..2", "workers", "min must be at most max; got 3 and 2"),
        ("workers: {min: 2, max: 1}", "workers.min", "got 2 and 1"),
        ("workers: {max: 2, initial: 3}", "workers.initial", "within min..max (1..2); got 3"),
        ("workers: {schedule: [{at_step: 5, workers: 2}]}", "workers.schedule.0.workers", "(1..1); got 2"),
        (
            "workers: {max: 2, schedule: [{at_step: 5, workers: 2}, {at_step: 5, workers: 1}]}",
            "workers.schedule.1.at_step",
            "got 5 after 5",
        ),
        (
            "train: {max_steps: 5}\nworkers: {schedule: [{at_step: 5, workers: 1}]}",
            "workers.schedule.0.at_step",
            "less than train.max_steps; got 5 and 5",
        ),
        (
            "train: {determinism: exact}\ncommunication: {compression: int8}",
            "communication.compression",
            "must not be int8 where train.determinism is exact: compression error depends on the number of workers",
        ),
        ("train: {determinism: exact}\ncommunication: {compression: auto}", "communication.compression", "not be auto"),
        ("train: {determinism: exact}\ncommunication: {tokens: bf16}", "communication.tokens", "must not be bf16"),
        (
            "train: {determinism: exact}\ncommunication: {ranks_per_token: 1}",
            "communication.ranks_per_token",
            "depends on the placement of experts",
        ),
        (
            "verify: {every: 5}\nworkers: {max: 2, standby: 1}\ncheckpoint: {every: 50}",
            "verify.every",
            "needs train.determinism to be exact; got fast",
        ),
        (
            "verify: {every: 5}\ntrain: {determinism: exact}\ncheckpoint: {every: 50}",
            "verify.every",
            "needs workers.standby to be at least 1; got 0",
        ),
        (
            "verify: {every: 5}\ntrain: {determinism: exact}\nworkers: {max: 2, standby: 1}",
            "verify.every",
            "needs checkpoint.every to be a number of steps; got auto",
        ),
        (
            "verify: {every: 5, steps: 9}\ntrain: {determinism: exact}\nworkers: {max: 2, standby: 1}\n"
            "checkpoint: {every: 9}",
            "verify.steps",
            "must be less than checkpoint.every: they follow the newest checkpoint; got 9 and 9",
        ),
        ("train: {determinism: exact, micro_batch_size: auto}", "train.micro_batch_size", "found by measuring"),
        ("train: {determinism: exact, float8: true}", "train.float8", "must be false where determinism is exact"),
        (
            'train: {float8: true}\nmodel: {entrypoint: "mine:build"}',
            "train.float8",
            "must be false with a model of mine:build",
        ),
        (
            "train: {determinism: exact}\neval: {every: 1}\n"
            "curriculum: {stages: [{name: a, until: {plateau: 2, max_steps: 9}}, {name: b}]}",
            "curriculum.stages.0.until.plateau",
            "depends on time",
        ),
        ("envs: {LD_PRELOAD: x}", "envs.LD_PRELOAD", "must not be set"),
        ("envs: {RAY_AUTH_MODE: x}", "envs.RAY_AUTH_MODE", "must not be set"),
        ("envs: {pythonpath: x}", "envs.pythonpath", "must not be set"),
        ("envs: {Glibc_Tunables: x}", "envs.Glibc_Tunables", "must not be set"),
        ("envs: {GCONV_PATH: x}", "envs.GCONV_PATH", "must not be set"),
        ("envs: {BASH_ENV: x}", "envs.BASH_ENV", "must not be set"),
        ("envs: {ORCHESTRATOR_ALLOW_NO_TOKEN: x}", "envs.ORCHESTRATOR_ALLOW_NO_TOKEN", "must not be set"),
        ("secrets: {DYLD_INSERT_LIBRARIES: env:A}", "secrets.DYLD_INSERT_LIBRARIES", "must not be set"),
        ("envs: {a-b: x}", "envs.a-b", "letters, digits and _"),
        ('envs: {A: "x\\0"}', "envs.A", "NUL"),
        ("curriculum: {stages: []}", "curriculum.stages", "at least one stage"),
        ("curriculum: {stages: [{name: a}, {name: b}]}", "curriculum.stages.0.name", "set until of a"),
        (
            "curriculum: {stages: [{name: a, until: {steps: 1}}, {name: a}]}",
            "curriculum.stages.1.name",
            "a is there twice",
        ),
        ("curriculum: {stages: [{name: next}]}", "curriculum.stages.0.name", "no stage is called next"),
        (
            "curriculum: {stages: [{name: a, until: {steps: 1}}]}",
            "curriculum.stages.0.until",
            "leave until of a out",
        ),
        (
            "curriculum: {stages: [{name: a, until: {steps: 1, tokens: 2}}, {name: b}]}",
            "curriculum.stages.0.until.steps",
            "name one",
        ),
        (
            "curriculum: {stages: [{name: a, until: {plateau: 1}}, {name: b}]}",
            "curriculum.stages.0.until.plateau",
            "name max_steps",
        ),
        (
            "curriculum: {stages: [{name: a, until: {plateau: 1, max_steps: 5}}, {name: b}]}",
            "curriculum.stages.0.until",
            "set eval.every",
        ),
        (
            "workers: {min: 1, max: 3, initial: 2}\nautoscale: {policy: stage}\n"
            "curriculum: {stages: [{name: a, workers: 2..4}]}",
            "curriculum.stages.0.workers",
            "within workers.min..max (1..3); got 2..4 in a",
        ),
        (
            "workers: {min: 1, max: 3, initial: 3}\nautoscale: {policy: stage}\n"
            "curriculum: {stages: [{name: a, workers: {min: 1, max: 2}}]}",
            "workers.initial",
            "workers of the first stage (1..2); got 3",
        ),
        (
            "workers: 1..3\ncurriculum: {stages: [{name: a, workers: 1}]}",
            "curriculum.stages.0.workers",
            "workers of stage a need autoscale.policy stage, available or throughput; got manual",
        ),
        (
            "workers: 1..3\nautoscale: {policy: stage}\ncurriculum: {stages: [{name: a}]}",
            "autoscale.policy",
            "none does",
        ),
        (
            "workers: {min: 1, max: 3, schedule: [{at_step: 5, workers: 2}]}\nautoscale: {policy: available}",
            "autoscale.policy",
            "both decide the number of workers",
        ),
        ("workers: 2\nautoscale: {policy: throughput}", "autoscale.policy", "needs room"),
    ],
)
def test_rules_between_keys_are_placed_at_a_key_of_the_file(body: str, path: str, words: str) -> None:
    text = f"{HEAD}{body}\n"
    problem = the_problem_of(text)
    assert problem.path == path
    assert words in problem.message
    last_key = [part for part in path.split(".") if not part.isdigit()][-1]
    assert text.splitlines()[problem.line - 1][problem.column - 1 :].startswith(last_key)


def test_all_mistakes_are_reported_at_once_in_the_order_of_the_file() -> None:
    text = """\
schema: v1
name: Try
wokers: 2
model: {num_experts_per_tok: 9, num_attention_heads: "4"}
train:
  max_steps: 50
  max_steps: 60
  micro_batch_size: 3
  lr: -1
  lr_scheduler: {warmup_steps: 90}
workers: {max: 3, schedule: [{at_step: 6, workers: 4}]}
"""
    found = [(problem.line, problem.path) for problem in problems_of(text)]
    assert found == [
        (2, "name"),
        (3, "wokers"),
        (4, "model.num_experts_per_tok"),
        (4, "model.num_attention_heads"),
        (7, "train.max_steps"),
        (8, "train.micro_batch_size"),
        (9, "train.lr"),
        (10, "train.lr_scheduler.warmup_steps"),
        (11, "workers.schedule.0.workers"),
    ]


def test_a_rule_between_keys_is_skipped_if_a_value_is_wrong() -> None:
    problem = the_problem_of(f"{HEAD}train: {{max_steps: none, lr_scheduler: {{warmup_steps: 5000}}}}\n")
    assert problem.path == "train.max_steps"


def test_a_null_section_hides_no_other_mistake() -> None:
    found = problems_of(f"{HEAD}eval:\ntrain: {{max_steps: 5}}\nworkers: {{schedule: [{{at_step: 5, workers: 1}}]}}\n")
    assert [problem.path for problem in found] == ["eval", "workers.schedule.0.at_step"]


def test_error_ends_by_saying_that_nothing_was_started() -> None:
    with pytest.raises(SpecError) as caught:
        parse_job("schema: v1\n")
    assert str(caught.value).endswith("Nothing was started.")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: try\n", "job.yaml:1:1: schema: required; write `schema: v1`"),
        ("schema: v1\n", "job.yaml:1:1: name: required; write `name: my-run`"),
        ("schema: v2\nname: try\n", "job.yaml:1:1: schema: must be 'v1'; got \"v2\""),
        ("schema: 1\nname: try\n", "job.yaml:1:1: schema: must be 'v1'; got 1"),
        ("", "job.yaml:1:1: must be a mapping of keys, beginning with `schema: v1`; got nothing"),
        ("# only a comment\n", "job.yaml:1:1: must be a mapping of keys, beginning with `schema: v1`; got nothing"),
        ("- a\n", 'job.yaml:1:1: must be a mapping of keys, beginning with `schema: v1`; got ["a"]'),
    ],
    ids=["no-schema", "no-name", "other-schema", "number-schema", "empty", "comment", "list"],
)
def test_what_every_file_must_have(text: str, expected: str) -> None:
    assert str(the_problem_of(text)) == expected


@pytest.mark.parametrize("line", ["key{}: 1\n", "same: 1\n", "key{}: yes\n"], ids=["unknown", "duplicate", "word"])
def test_a_file_of_nothing_but_mistakes_is_answered_at_once(line: str) -> None:
    text = HEAD + "".join(line.format(i) for i in range(2000))
    assert len(problems_of(text)) == MAX_PROBLEMS


def test_an_alias_in_a_list_is_one_problem() -> None:
    problem = the_problem_of(f"{HEAD}workers: {{schedule: [*x]}}\n")
    assert problem.path == "workers.schedule.0"


def test_a_duplicate_section_in_two_notations_is_refused() -> None:
    found = problems_of(f"{HEAD}train: {{max_steps: yes}}\ntrain: 5\n")
    assert [(problem.line, problem.path) for problem in found] == [(3, "train.max_steps"), (4, "train")]


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"can't be read: No such file.*Nothing was started"):
        load_job(tmp_path / "none.yaml")


def test_file_over_one_mebibyte(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(HEAD + "#" * (2**20 - len(HEAD)))
    assert load_job(file).name == "try"
    file.write_text(HEAD + "#" * (2**20 - len(HEAD) + 1))
    with pytest.raises(SpecError, match="must be at most 1 MiB"):
        load_job(file)


def test_file_that_is_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_bytes(b"schema: v1\nname: caf\xe9\n")
    with pytest.raises(SpecError) as caught:
        load_job(file)
    (problem,) = caught.value.problems
    assert (problem.line, problem.column) == (2, 10)
    assert "0xe9 at offset 20" in problem.message


@given(st.text(max_size=200))
def test_any_text_gives_a_job_or_a_spec_error(text: str) -> None:
    for candidate in (text, f"{HEAD}{text}", f"{HEAD}workers: {text}"):
        with suppress(SpecError):
            parse_job(candidate)


def test_overrides_replace_values_of_the_file() -> None:
    text = f"{HEAD}train: {{max_steps: 7, lr: 1e-3}}\nworkers: {{min: 1, max: 2}}\n"
    job = parse_job(
        text, "job.yaml", ["train.max_steps=9", "workers=2..4", "eval.every=3", "name=other", "envs={A: b}"]
    )
    assert (job.train.max_steps, job.train.lr, job.eval.every, job.name, job.envs) == (9, 1e-3, 3, "other", {"A": "b"})
    assert (job.workers.min, job.workers.max) == (2, 4)


def test_a_mistake_in_an_override_is_located_in_the_override() -> None:
    with pytest.raises(SpecError) as caught:
        parse_job(f"{HEAD}train: {{max_steps: 7}}\n", "job.yaml", ["train.max_steps=-1", "trian.lr=2"])
    told = {(problem.file, problem.path) for problem in caught.value.problems}
    assert told == {("--set train.max_steps=-1", "train.max_steps"), ("--set trian.lr=2", "trian")}


def test_a_value_that_is_no_yaml_is_an_error() -> None:
    with pytest.raises(SpecError, match="--set envs={A"):
        parse_job(HEAD, "job.yaml", ["envs={A"])


@pytest.mark.parametrize("override", ["train.max_steps", "=3", ".steps=3", "train..steps=3"])
def test_what_sets_nothing_is_refused(override: str) -> None:
    with pytest.raises(UsageError, match="it must be KEY=VALUE"):
        parse_job(HEAD, "job.yaml", [override])


def test_values_of_python_are_a_job() -> None:
    values = {"schema": "v1", "name": "try", "storage": Path("a"), "train": {"optimizer": {"betas": (0.8, 0.9)}}}
    job = job_from(values)
    assert (job.storage, job.train.optimizer.betas) == ("a", (0.8, 0.9))
    assert values["storage"] == Path("a")  # they are left as they are


@pytest.mark.parametrize("value", [object(), {1, 2}, float("nan")], ids=["object", "set", "nan"])
def test_what_no_file_could_hold_is_refused(value: object) -> None:
    with pytest.raises(SpecError, match="job:1:1: must hold only what a job file can"):
        job_from({"schema": "v1", "name": "try", "envs": value})
    endless: dict[str, object] = {}
    endless["envs"] = endless
    with pytest.raises(SpecError, match="Circular"):
        job_from(endless)


def test_a_setting_counts_in_place_of_a_file_and_is_named_in_errors() -> None:
    settings = [
        Setting(("train", "max_steps"), 9, "config(9)"),
        Setting(("workers", "max"), 3, "config(3)"),
        "train.lr=1e-3",
    ]
    job = parse_job(f"{HEAD}train: {{max_steps: 7}}\nworkers: 2\n", "job.yaml", settings)
    assert (job.train.max_steps, job.train.lr, job.workers.min, job.workers.max) == (9, 1e-3, 2, 3)
    with pytest.raises(SpecError, match=r"config\(-1\):1:1: train\.max_steps: must be"):
        parse_job(HEAD, "job.yaml", [Setting(("train", "max_steps"), -1, "config(-1)")])


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("", 9),
        ("eval: {every: 3}", 1000),
        ("eval: {every: null}", 9),
        ("eval: {rows: 3}", 9),
        ("workers: {schedule: []}", 9),
        ("workers: 2", 9),
    ],
)
def test_a_setting_may_yield_to_other_keys_of_the_job(text: str, steps: int) -> None:
    unless = (("eval", "every"), ("workers", "schedule"))
    assert (
        parse_job(f"{HEAD}{text}", "job.yaml", [Setting(("train", "max_steps"), 9, "it", unless)]).train.max_steps
        == steps
    )
