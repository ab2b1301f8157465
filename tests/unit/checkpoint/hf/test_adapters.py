"""Directories of adapters, and the weights beside them: what doesn't fit is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from orchestrator.checkpoint.hf.adapters import CONFIG, WEIGHTS, export_peft, open_adapter
from orchestrator.checkpoint.hf.pretrained import check_base, resolved, weights_digest
from orchestrator.checkpoint.hf.shapes import listed
from orchestrator.errors import CheckpointCorrupt, OrchestratorError, UsageError
from orchestrator.spec.job import JobSpec
from orchestrator.spec.model import ModelSpec
from orchestrator.submission.submission import with_adapters
from tests.support.checkpoints import write_weights
from tests.support.pretrained import VOCAB, write_directory

MODULES = ["q_proj", "gate_proj", "up_proj", "down_proj"]


def _job(base: Path, adapter: Path | None = None, **lora: Any) -> JobSpec:
    keys = {"r": 2, "target_modules": MODULES, "init_from": None if adapter is None else str(adapter), **lora}
    model = resolved(ModelSpec.model_validate({"init_from": str(base), "lora": keys}), base)
    return JobSpec(name="adapters", model=model)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_directory(tmp_path / "base")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """An adapter as it is exported here."""
    job = _job(base)
    job = job.model_copy(update={"model": with_adapters(job.model)})
    draws, weights = np.random.default_rng(0), dict[str, np.ndarray[Any, Any]]()
    for param in listed(job.model, VOCAB)[0]:
        if ".lora." in param.name:
            weights[param.name] = draws.normal(size=param.shape).astype(np.float32)
    export_peft(write_weights(tmp_path / "checkpoints", weights), job, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_exported_adapter_is_read_again(base: Path, adapter: Path) -> None:
    job = _job(base, adapter)
    model = with_adapters(job.model)
    assert model.lora is not None and model.lora.base_sha256 == weights_digest(base)
    files = open_adapter(model)
    files.check(model)
    names = [part.key for part in files.parts("layers.1.mlp.experts.3.lora.gate_up.A")]
    prefix = "base_model.model.model.layers.1.mlp.experts.3."
    assert names == [f"{prefix}gate_proj.lora_A.weight", f"{prefix}up_proj.lora_A.weight"]
    assert all(name in files.shapes for name in names) and files.parts("layers.1.attention.query") == ()
    assert json.loads((adapter / CONFIG).read_text())["base_model_name_or_path"] == str(base)


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        config = json.loads((directory / CONFIG).read_text())
        (directory / CONFIG).write_text(json.dumps(config | changes))

    return change


def _tensors(change: Callable[[dict[str, np.ndarray[Any, Any]]], None]) -> Callable[[Path], None]:
    def changed(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        change(tensors)
        save_file(tensors, directory / WEIGHTS)

    return changed


QUERY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param(_config(r=3), UsageError, "model.lora differ: r is 2 and 3", id="rank"),
        pytest.param(_config(lora_alpha=3), UsageError, "lora_alpha is 16.0 and 3", id="scale"),
        pytest.param(_config(target_modules=["k_proj"]), UsageError, 'target_modules is ["down_proj', id="modules"),
        pytest.param(_config(target_modules="all-linear"), UsageError, 'and "all-linear"', id="modules by a word"),
        pytest.param(_config(use_dora=True), UsageError, "has use_dora true, which adapters here don't", id="DoRA"),
        pytest.param(_config(peft_type="IA3"), UsageError, 'has peft_type "IA3"', id="another kind"),
        pytest.param(lambda d: (d / CONFIG).unlink(), UsageError, "adapter_config.json can't be read", id="no config"),
        pytest.param(lambda d: (d / WEIGHTS).unlink(), CheckpointCorrupt, "can't be read", id="no weights"),
        pytest.param(_tensors(lambda t: t.pop(QUERY)), CheckpointCorrupt, f"lacks {QUERY}", id="a tensor is missing"),
        pytest.param(
            _tensors(lambda t: t.update({QUERY: t[QUERY][:, 1:].copy()})),
            CheckpointCorrupt,
            "doesn't fit the model in model.init_from: " + QUERY + " has (2, 15), not (2, 16)",
            id="another width",
        ),
        pytest.param(
            _tensors(lambda t: t.update({"lm_head.lora_A.weight": t[QUERY]})),
            CheckpointCorrupt,
            "has no place for: lm_head.lora_A.weight",
            id="one more tensor",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    base: Path, adapter: Path, change: Callable[[Path], None], error: type[OrchestratorError], message: str
) -> None:
    change(adapter)
    with pytest.raises(error) as caught:
        with_adapters(_job(base, adapter).model)
    assert message in caught.value.message and caught.value.unchanged == "Nothing was started."


def test_an_adapter_of_another_base_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Its shapes fit; our files say which weights it was trained beside."""
    other = write_directory(tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, other / "model.safetensors")
    with pytest.raises(UsageError, match="is of other weights, SHA-256 "):
        with_adapters(_job(other, adapter).model)
    with safe_open(adapter / WEIGHTS, framework="numpy") as opened:
        assert opened.metadata() == {"format": "pt", "base_sha256": weights_digest(base)}


def test_a_base_that_is_gone_or_changed_is_refused(base: Path) -> None:
    model = with_adapters(_job(base).model)
    check_base(model)
    tensors = load_file(base / "model.safetensors")
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name] + 1}, base / "model.safetensors")
    with pytest.raises(UsageError, match="has changed: its SHA-256 is "):
        check_base(model)
    (base / "model.safetensors").unlink()
    (base / "config.json").unlink()
    (base / "tokenizer.json").unlink()
    base.rmdir()
    with pytest.raises(UsageError, match="doesn't exist, and had the weights beside which"):
        check_base(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": None}, "trains no adapters"),
        ({"bias_update_speed": 0.5}, "the router's bias"),
        ({"trainable": ("*.lora.*", "head")}, "trains other weights too: train.trainable head"),
    ],
)
def test_what_peft_has_no_place_for_is_not_written(
    base: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    job = _job(base)
    trainable = {"trainable": changes.pop("trainable", job.train.trainable)}
    model, train = job.model.model_copy(update=changes), job.train.model_copy(update=trainable)
    with pytest.raises(UsageError, match=message):
        export_peft(tmp_path / "none", job.model_copy(update={"model": model, "train": train}), tmp_path / "out")
    with pytest.raises(UsageError, match="keeps no average of its weights"):
        export_peft(tmp_path / "none", _job(base), tmp_path / "out", of_ema=True)
    assert not (tmp_path / "out").exists()
