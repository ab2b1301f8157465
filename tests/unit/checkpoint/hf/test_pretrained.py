"""Directories of others' models: sizes taken or compared, and what is wrong named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from orchestrator.checkpoint.hf.pretrained import Part, open_pretrained, resolved
from orchestrator.errors import CheckpointCorrupt, OrchestratorError, UsageError
from orchestrator.spec.model import ModelSpec
from tests.support.pretrained import SPEC, VOCAB, write_directory

Tensors = dict[str, np.ndarray[Any, Any]]


def _spec(directory: Path, **keys: Any) -> ModelSpec:
    return ModelSpec(init_from=str(directory), **keys)


def test_sizes_come_from_the_directory(tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "hf")
    found = resolved(_spec(directory, bias_update_speed=0.5), directory)
    taken = {"init_from": str(directory), "bias_update_speed": 0.5, "embedding_scale": 1.0}
    assert found == SPEC.model_copy(update=taken)
    open_pretrained(directory).check(found)
    assert resolved(found, directory) == found  # what a stored job says


def test_keys_as_older_versions_write_them(tmp_path: Path) -> None:
    old = {"rope_parameters": None, "rope_theta": 5e5, "partial_rotary_factor": 0.25, "rope_scaling": None}
    directory = write_directory(tmp_path / "hf", **old, head_dim=None, n_group=None, n_shared_experts=None)
    found = resolved(_spec(directory), directory)
    assert (found.rope_theta, found.partial_rotary_factor) == (5e5, 0.25)
    assert (found.head_dim, found.n_group, found.n_shared_experts) == (8, 1, 1)


def test_a_size_beyond_the_defaults_is_no_mistake_before_the_directory_is_read(tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "hf", n_routed_experts=64, num_experts_per_tok=20)
    assert resolved(_spec(directory, num_experts_per_tok=20), directory).n_routed_experts == 64


def test_every_difference_is_named(tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "hf")
    given = _spec(directory, num_experts_per_tok=3, rope_theta=7.0, hidden_size=16, scoring_func="softmax")
    with pytest.raises(UsageError) as caught:
        resolved(given, directory)
    assert "model.num_experts_per_tok is 3 and 2" in caught.value.message
    assert "model.rope_theta is 7.0 and 10000.0" in caught.value.message
    assert 'model.scoring_func is "softmax" and "sigmoid"' in caught.value.message
    assert "hidden_size" not in caught.value.message


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        pytest.param({"architectures": ["GPT2LMHeadModel"]}, "its architecture is GPT2LMHeadModel", id="another one"),
        pytest.param({"architectures": None}, "its architecture is null", id="none named"),
        pytest.param({"hidden_size": None, "vocab_size": None}, "lacks vocab_size, hidden_size", id="missing keys"),
        pytest.param({"hidden_act": "gelu"}, 'hidden_act "gelu"', id="another activation"),
        pytest.param({"norm_topk_prob": False}, "norm_topk_prob false", id="gates that don't add up"),
        pytest.param({"rope_scaling": {"type": "dynamic"}}, 'rope_type "dynamic"', id="rope scaled by the length"),
        pytest.param({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor Field required", id="no factor"),
        pytest.param(
            {"num_key_value_heads": 3}, "num_key_value_heads must divide num_attention_heads", id="sizes that don't fit"
        ),
    ],
)
def test_a_model_that_ours_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], rule: str) -> None:
    directory = write_directory(tmp_path / "hf", **changes)
    with pytest.raises(UsageError, match="config.json") as caught:
        resolved(_spec(directory), directory)
    assert rule in caught.value.message


@pytest.mark.parametrize(
    ("content", "rule"), [(None, "No such file"), ("{", "not JSON"), ("[1]", "JSON list")], ids=["none", "cut", "list"]
)
def test_an_invalid_config_is_named(tmp_path: Path, content: str | None, rule: str) -> None:
    directory = write_directory(tmp_path / "hf")
    (directory / "config.json").unlink()
    if content is not None:
        (directory / "config.json").write_text(content)
    with pytest.raises(UsageError, match=rule):
        resolved(_spec(directory), directory)


def _without_norm(tensors: Tensors) -> None:
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.experts.3.up_proj.weight"]


def _narrow_head(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = np.ones((VOCAB, 3), np.float32)


def _integers(tensors: Tensors) -> None:
    tensors["model.norm.weight"] = np.ones(16, np.int32)


def _with_bias(tensors: Tensors) -> None:
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.ones(16, np.float32)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (_without_norm, "lacks model.layers.1.mlp.experts.3.up_proj.weight, model.norm.weight"),
        (_narrow_head, r"lm_head.weight has \(300, 3\), not \(300, 16\)"),
        (_integers, r"model.norm.weight \(I32\)"),
        (_with_bias, "no place for: model.layers.0.self_attn.q_proj.bias"),
    ],
)
def test_wrong_tensors_are_named(tmp_path: Path, change: Callable[[Tensors], None], rule: str) -> None:
    directory = write_directory(tmp_path / "hf")
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointCorrupt, match=rule):
        open_pretrained(directory).check(resolved(_spec(directory), directory))


def test_layers_for_several_tokens_at_once_are_passed_over(tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "hf")
    tensors = load_file(directory / "model.safetensors") | {
        "model.layers.2.eh_proj.weight": np.ones((2, 2), np.float32)
    }
    save_file(tensors, directory / "model.safetensors")
    open_pretrained(directory).check(resolved(_spec(directory), directory))


def _split(directory: Path) -> dict[str, str]:
    """The weights in two files; returns the index's map."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    places = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in tensors if places[name] == file}, directory / file)
    return places


def _write_index(directory: Path, places: object) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_several_files(tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "hf")
    places = _split(directory)
    _write_index(directory, places)
    found = open_pretrained(directory)
    found.check(resolved(_spec(directory), directory))
    assert found.parts("head") == (Part(directory / places["lm_head.weight"], "lm_head.weight"),)
    halves = [part.key.split(".")[-2] for part in found.parts("layers.1.mlp.experts.2.gate_up")]
    assert halves == ["gate_proj", "up_proj"]


def _lost_file(directory: Path) -> None:
    _write_index(directory, _split(directory))
    (directory / "part-1.safetensors").unlink()


def _cut_file(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _wrong_index(directory: Path) -> None:
    _write_index(directory, dict.fromkeys(_split(directory), "part-0.safetensors"))


def _outside(directory: Path) -> None:
    _write_index(directory, dict.fromkeys(_split(directory), "../elsewhere.safetensors"))


def _no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "rule"),
    [
        (_lost_file, "part-1.safetensors can't be read"),
        (_cut_file, "model.safetensors can't be read"),
        (_wrong_index, "names tensors that its files lack"),
        (_outside, "files beside it"),
        (_no_weights, "holds neither"),
    ],
)
def test_files_that_are_not_whole_are_named(tmp_path: Path, spoil: Callable[[Path], None], rule: str) -> None:
    directory = write_directory(tmp_path / "hf")
    spoil(directory)
    with pytest.raises(OrchestratorError, match=rule):
        open_pretrained(directory)
