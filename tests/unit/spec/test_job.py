from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.errors import SpecError
from orchestrator.spec.job import JobSpec
from orchestrator.spec.job_file.loading import parse_job
from orchestrator.spec.keys.section import Section
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.workers import WorkersSpec


def job(**keys: Any) -> JobSpec:
    return JobSpec.model_validate({"name": "try", **keys})


@pytest.mark.parametrize(
    ("workers", "expected"),
    [
        (2, (2, 2, 2)),
        ("2", (2, 2, 2)),
        ("2..4", (2, 4, 2)),
        ("2 .. 4", (2, 4, 2)),
        ({"min": 2}, (2, 2, 2)),
        ({"max": 3}, (1, 3, 1)),
        ({"min": 1, "max": 3, "initial": 2}, (1, 3, 2)),
    ],
)
def test_forms_of_workers(workers: Any, expected: tuple[int, int, int]) -> None:
    spec = job(workers=workers).workers
    assert (spec.min, spec.max, spec.initial) == expected


@pytest.mark.parametrize("workers", [0, "0..2", "4..2", "a", "2...4", -1, True, None, 2.0])
def test_workers_that_make_no_sense(workers: Any) -> None:
    with pytest.raises(ValidationError):
        job(workers=workers)


@pytest.mark.parametrize("condition", ["a", "!a", "in(a,b)", "in(a, b.c)", "!in(a-1 , b_2)", "a" * 63])
def test_label_selectors(condition: str) -> None:
    selector = {"pool": condition, "example.com/zone": "x"}
    assert job(workers={"label_selector": selector}).workers.label_selector == {
        "pool": condition.replace(" ", ""),  # with which Ray finds no node
        "example.com/zone": "x",
    }


@pytest.mark.parametrize(
    ("selector", "rule"),
    [
        *(
            ({"pool": text}, "must give a condition for each label")
            for text in ("", "!", "in()", "in(a,)", "(a)", "-a", "a b!", "!!a")
        ),
        ({"pool": "a" * 64}, "must give a condition for each label"),
        ({"": "a"}, "must name labels of letters"),
        ({"a b": "a"}, "must name labels of letters"),
        ({"ray.io/node-id": "a"}, "must not name ray.io/node-id"),
    ],
)
def test_label_selectors_refused(selector: dict[str, str], rule: str) -> None:
    with pytest.raises(ValidationError, match=rule):
        job(workers={"label_selector": selector})


@pytest.mark.parametrize(
    ("gpus", "on_nodes", "wanted"),
    [
        pytest.param("auto", [], 0.0, id="no nodes"),
        pytest.param("auto", [0.0, 0.0], 0.0, id="none"),
        pytest.param("auto", [8.0], 1.0, id="enough on one"),
        pytest.param("auto", [1.0, 0.0, 1.0], 1.0, id="just enough on several"),
        pytest.param("auto", [1.0], 0.0, id="too few"),
        pytest.param("auto", [1.5, 0.5], 0.0, id="parts of one are none"),
        pytest.param(0, [8.0], 0, id="not wanted"),
        pytest.param(0.75, [], 0.75, id="set by the job"),
    ],
)
def test_gpus_of_a_run(gpus: float | str, on_nodes: list[float], wanted: float) -> None:
    resources = job(resources={"gpus": gpus}, workers="2..4").resources
    run = resources.on_nodes(2, on_nodes)
    assert run.gpus == run.num_gpus == wanted
    assert run.on_nodes(1, [8.0]) == run  # decided once
    assert resources.num_gpus == (0.0 if gpus == "auto" else wanted)


@pytest.mark.parametrize("gpus", [-1, 2, True, "all", None])
def test_gpus_that_make_no_sense(gpus: Any) -> None:
    with pytest.raises(ValidationError, match="must be a number from 0 to 1, or auto"):
        job(resources={"gpus": gpus})


@pytest.mark.parametrize(("gpus", "workers"), [(0, 4), (1, 8), (0.75, "2..4"), (0.5, 1)])
def test_gpus(gpus: float, workers: Any) -> None:
    assert job(resources={"gpus": gpus}, workers=workers).resources.gpus == gpus


@pytest.mark.parametrize(
    ("gpus", "workers", "rule"),
    [
        (2, 1, "from 0 to 1, or auto"),
        (0.5, 2, "two workers must not fit on one GPU"),
        (0.25, {"min": 1, "standby": 1}, r"got 0\.25 and up to 2 workers with standbys"),
    ],
)
def test_gpus_refused(gpus: float, workers: Any, rule: str) -> None:
    with pytest.raises(ValidationError, match=rule):
        job(resources={"gpus": gpus}, workers=workers)


@pytest.mark.parametrize("name", ["a", "a1", "quick-start", "a" * 40])
def test_names(name: str) -> None:
    assert job(name=name).name == name


@pytest.mark.parametrize("name", ["", "A", "1a", "-a", "a-", "a_b", "a.b", "a/b", "a" * 41, "ä", "a\n"])
def test_names_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="1 to 40 of"):
        job(name=name)


@pytest.mark.parametrize(
    ("memory", "expected"), [(None, None), ("2GiB", 2**31), ("1.5 KiB", 1536), ("7B", 7), ("3GB", 3 * 10**9)]
)
def test_memory(memory: str | None, expected: int | None) -> None:
    assert job(resources={"memory": memory}).resources.memory_bytes == expected


@pytest.mark.parametrize("memory", ["2", "GiB", "2gib", "-2GiB", "2GiB ", "1.GiB"])
def test_memory_refused(memory: str) -> None:
    with pytest.raises(ValidationError, match="must be a number and a unit"):
        job(resources={"memory": memory})


@pytest.mark.parametrize("source", ["builtin:stdlib", "builtin:pydocs", "books", "./a:b", "/data/x.txt"])
def test_sources(source: str) -> None:
    assert job(data={"source": source}).data.source == source


@pytest.mark.parametrize("source", ["", " ", "builtin:", "builtin:wiki", "https://x/y", "s3://b", "a\0b"])
def test_sources_refused(source: str) -> None:
    with pytest.raises(ValidationError, match="source"):
        job(data={"source": source})


@pytest.mark.parametrize(
    "uri",
    [None, "postgresql://me@host/db", "sqlite:////runs/x.db", "http://127.0.0.1:5000", "https://mlflow.example/base"],
)
def test_tracking_uris(uri: str | None) -> None:
    assert job(tracking={"uri": uri}).tracking.uri == uri


@pytest.mark.parametrize(
    "uri", ["", "mlruns", "sqlite:///x.db", "sqlite:////", "file:mlruns", "postgres://x", "http://"]
)
def test_tracking_uris_refused(uri: str) -> None:
    with pytest.raises(ValidationError, match="ABSOLUTE"):
        job(tracking={"uri": uri})


@pytest.mark.parametrize("storage", ["/x", "runs", "s3://bucket", "gs://bucket/team/runs", "az://container/runs/"])
def test_storage_is_a_directory_or_a_bucket(storage: str) -> None:
    assert job(storage=storage).storage == storage
    assert job(storage=None).storage == "./runs"


@pytest.mark.parametrize("storage", ["hdfs://host/runs", "s3://", "s3:///runs", "s3://bucket//runs", "az://c?sig=1"])
def test_other_storage_is_refused(storage: str) -> None:
    with pytest.raises(ValidationError, match="must be a path of the file system, or s3://, gs:// or az://"):
        job(storage=storage)


@pytest.mark.parametrize(
    ("model", "head_dim", "rotary_size"),
    [
        ({}, 32, 32),
        ({"partial_rotary_factor": 0.5}, 32, 16),
        ({"head_dim": 64}, 64, 64),
        ({"partial_rotary_factor": 0.0}, 32, 0),
    ],
)
def test_head_sizes(model: dict[str, Any], head_dim: int, rotary_size: int) -> None:
    spec = ModelSpec.model_validate(model)
    assert (spec.head_dim, spec.rotary_size) == (head_dim, rotary_size)


def test_head_size_frees_hidden_size_from_num_heads() -> None:
    assert ModelSpec(hidden_size=100, num_attention_heads=6, head_dim=32).head_dim == 32


@pytest.mark.parametrize("entrypoint", ["m:f", "a.b_2.c:build"])
def test_entrypoints(entrypoint: str) -> None:
    options = {"width": 2, "names": ["a", None], "deep": {"x": True}}
    spec = job(model={"entrypoint": entrypoint, "options": options, "code_dir": "src"}).model
    assert (spec.entrypoint, spec.options, spec.code_dir) == (entrypoint, options, "src")


@pytest.mark.parametrize("entrypoint", ["", "m", "m:", ":f", "a/b.py:f", "a..b:f", "a:f()", "a:b.c", "2a:f"])
def test_entrypoints_refused(entrypoint: str) -> None:
    with pytest.raises(ValidationError, match='must be "package.module:function"'):
        job(model={"entrypoint": entrypoint})


@pytest.mark.parametrize(
    ("model", "rule"),
    [
        ({"options": {"a": 1}}, "options has a meaning with entrypoint only"),
        ({"code_dir": "src"}, "code_dir has a meaning with entrypoint only"),
        (
            {"entrypoint": "m:f", "gradient_checkpointing": "full"},
            "gradient_checkpointing must be none with entrypoint",
        ),
        ({"entrypoint": "m:f", "init_from": "there"}, "init_from is for our own model"),
        ({"impl": "transformers"}, "impl: transformers needs a model: set init_from, or config with its model_type"),
        ({"config": {"model_type": "dots1"}}, "config has a meaning with impl: transformers only; remove it"),
        (
            {"impl": "transformers", "config": {"model_type": "dots1"}, "qk_norm": True},
            "qk_norm is of our model; with impl: transformers, set it in config",
        ),
        (
            {"impl": "transformers", "config": {"model_type": "dots1"}, "gradient_checkpointing": "sqrt"},
            "gradient_checkpointing must be none or full with impl: transformers; got sqrt",
        ),
        (
            {"impl": "transformers", "init_from": "there", "entrypoint": "m:f"},
            "entrypoint takes the place of impl: transformers; leave one out; got m:f",
        ),
        (
            {"impl": "transformers", "init_from": "there", "upcycle": True},
            "upcycle makes a mixture of ours; it must be false with impl: transformers",
        ),
        ({"upcycle": True}, "upcycle needs a dense model in init_from; got none"),
        (
            {"init_from": "there", "upcycle": True, "n_shared_experts": 1},
            "n_shared_experts must be 0 with upcycle, so that the mixture begins as the dense model; got 1",
        ),
    ],
)
def test_keys_that_depend_on_the_entrypoint(model: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValidationError, match=rule):
        job(model=model)


@pytest.mark.parametrize(
    ("micro_batch_size", "rows", "tokens"),
    [(4, 4, 512), ("1000 tokens", 0, 1000), ("9 tokens", 0, 9), ("auto", 0, 128)],
)
def test_the_memory_of_a_micro_batch(micro_batch_size: int | str, rows: int, tokens: int) -> None:
    train = job(train={"global_batch_size": 12, "micro_batch_size": micro_batch_size}).train
    assert (train.micro_batch_rows, train.micro_batch_tokens, train.fits_memory) == (
        rows,
        tokens,
        micro_batch_size == "auto",
    )


def test_a_job_survives_a_round_trip_through_json() -> None:
    text = """
schema: v1
name: try
workers: {min: 1, max: 3, initial: 2, standby: 1, schedule: [{at_step: 4, workers: 3}, {at_step: 9, workers: 1}]}
model: {hidden_size: 100, num_attention_heads: 6, head_dim: 32}
train: {max_steps: 10, optimizer: {betas: [0.8, 0.9]}}
resources: {memory: 1GiB}
envs: {A: b}
"""
    spec = parse_job(text)
    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec
    assert JobSpec.model_validate_json(JobSpec(name="try").model_dump_json()) == JobSpec(name="try")


def test_jobs_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        job().workers.min = 3  # type: ignore[misc]


def test_only_name_has_no_default() -> None:
    assert [name for name, field in JobSpec.model_fields.items() if field.is_required()] == ["name"]


def sections(section: type[Section] = JobSpec) -> list[type[Section]]:
    return [section, *(c for c in Section.__subclasses__() if c is not section)]


@pytest.mark.parametrize("section", sections(), ids=lambda s: s.__name__)
def test_every_section_and_key_is_described(section: type[Section]) -> None:
    assert section.__doc__
    for name, field in section.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


def test_json_schema_knows_the_short_forms_and_what_is_required() -> None:
    schema = JobSpec.model_json_schema()
    assert schema["required"] == ["schema", "name"]
    assert schema["additionalProperties"] is False
    kinds = {option.get("type", "mapping") for option in schema["properties"]["workers"]["anyOf"]}
    assert kinds == {"mapping", "integer", "string"}


def test_several_broken_rules_of_one_section_are_named_together() -> None:
    with pytest.raises(ValidationError, match=r"num_experts_per_tok must.*first_k_dense_replace must"):
        ModelSpec(num_experts_per_tok=9, first_k_dense_replace=9)


def test_schedule_at_the_bounds() -> None:
    spec = WorkersSpec.model_validate({"max": 2, "schedule": [{"at_step": 1, "workers": 2}]})
    assert job(workers=spec, train={"max_steps": 2}).workers.schedule[0].at_step == 1
    with pytest.raises(ValidationError, match="less than train.max_steps"):
        job(workers=spec, train={"max_steps": 1})


def test_a_registered_model_may_have_an_alias() -> None:
    named = job(tracking={"register_as": "books moe-1.0", "alias": "champion"}).tracking
    assert (named.register_as, named.alias) == ("books moe-1.0", "champion")


@pytest.mark.parametrize(
    ("tracking", "rule"),
    [
        pytest.param({"alias": "champion"}, "alias needs register_as", id="alias-alone"),
        pytest.param({"register_as": "a", "alias": "v2"}, "MLflow's own", id="version"),
        pytest.param({"register_as": "a", "alias": "Latest"}, "MLflow's own", id="latest"),
        pytest.param({"register_as": "a/b"}, "must begin with a letter", id="slash"),
        pytest.param({"register_as": ""}, "must begin with a letter", id="empty"),
    ],
)
def test_names_that_mlflow_would_refuse_are_refused_here(tracking: dict[str, str], rule: str) -> None:
    with pytest.raises(ValidationError, match=rule):
        job(tracking=tracking)


@pytest.mark.parametrize(
    ("secrets", "rule"),
    [
        ("{KEY: hunter22}", "must be file:PATH with an absolute path, or env:NAME"),
        ("{KEY: file:relative}", "must be file:PATH with an absolute path, or env:NAME"),
        ("{KEY: env:a-b}", "must be file:PATH with an absolute path, or env:NAME"),
        ("{LD_PRELOAD: env:A}", "must not be set: they change how processes are loaded, or how Ray behaves"),
        ("{TWICE: env:A}", "TWICE is in envs too"),
    ],
)
def test_a_secret_is_named_without_its_value(secrets: str, rule: str) -> None:
    with pytest.raises(SpecError, match=rule):
        parse_job(f"schema: v1\nname: try\nenvs: {{TWICE: b}}\nsecrets: {secrets}\n")
    assert (
        parse_job("schema: v1\nname: try\nsecrets: {KEY: file:/run/key, OTHER: env:KEY}\n").secrets["OTHER"]
        == "env:KEY"
    )


def test_limits_on_the_ranks_of_a_token_are_not_for_routers_of_transformers() -> None:
    model = {"impl": "transformers", "config": {"model_type": "dots1"}}
    with pytest.raises(ValidationError, match="with impl: transformers they are its own: leave it out; got 2"):
        job(model=model, communication={"ranks_per_token": 2})


@pytest.mark.parametrize("package", ["einops==0.8.1", "numpy", "tiny @ file:///wheels/tiny-1.0-py3-none-any.whl"])
def test_packages(package: str) -> None:
    assert job(pip=[package]).pip == [package]


@pytest.mark.parametrize(
    ("package", "rule"),
    [
        ("--index-url=http://evil", "must be a package as pip names it"),
        ("-r requirements.txt", "must be a package as pip names it"),
        ("two words", "must be a package as pip names it"),
        ("tiny @ https://me:secret@host/tiny.whl", "must name no password, which everybody could read"),
    ],
)
def test_packages_refused(package: str, rule: str) -> None:
    with pytest.raises(ValidationError, match=rule):
        job(pip=[package])
