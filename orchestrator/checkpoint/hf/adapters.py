"""Low-rank adapters in the files of peft: `adapter_config.json` and `adapter_model.safetensors`, read and written.

The parameters of an adapter are named after the module that they adapt. peft has an adapter for each of gate_proj and
up_proj, which are one matrix here, and for each expert by itself; where transformers stacks experts, peft fuses these
as it loads them, and has no way back.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save_file

from orchestrator.checkpoint.hf.export import refuse_missing_average, refuse_used
from orchestrator.checkpoint.hf.families import family_of_spec
from orchestrator.checkpoint.hf.family import Family
from orchestrator.checkpoint.hf.pretrained import FLOATS, Part, refuse_tensors
from orchestrator.checkpoint.hf.shapes import listed
from orchestrator.checkpoint.hf.tensor_listing import read_json, refused, tensors_in
from orchestrator.checkpoint.read import CheckpointReader
from orchestrator.elastic.state_spec import MASTER, adapted_by, average_of
from orchestrator.errors import UsageError
from orchestrator.spec.job import JobSpec
from orchestrator.spec.model import ModelSpec
from orchestrator.storage.atomic import new_directory
from orchestrator.storage.backends.location import Location

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
BASE = "base_sha256"  # in the metadata of our files: of the weights beside which adapters were trained
# Keys of peft's that change what an adapter computes, with the values that ours have.
NEUTRAL: Mapping[str, object] = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "use_rslora": False,
    "use_dora": False,
    "use_qalora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "lora_bias": False,
}
EQUAL_TO_NONE: tuple[object, ...] = (None, {}, [], False)
OTHER_ADAPTER = "Name a directory that `model export --format peft` has written, or peft's `save_pretrained`."


def their_names(family: Family, name: str) -> tuple[str, ...]:
    """peft's names of one of our adapters' parameters: one, or two for those of a gate-and-up matrix."""
    base, part = adapted_by(name), name[-1]
    assert base is not None
    return tuple(f"{PREFIX}{theirs.removesuffix('.weight')}.lora_{part}.weight" for theirs in family.their_names(base))


# -- Reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdapterFiles:
    """The tensors of a directory, by peft's names."""

    path: Path
    family: Family
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]

    def parts(self, name: str) -> tuple[Part, ...]:
        """Parts of one of our tensors, in the order of their rows; none of what isn't an adapter's."""
        if adapted_by(name) is None:
            return ()
        return tuple(Part(self.path / WEIGHTS, theirs) for theirs in their_names(self.family, name))

    def check(self, spec: ModelSpec) -> None:
        """Raises CheckpointCorrupt, which names tensors that are missing, unexpected, or of another shape or format."""
        assert spec.vocab_size is not None
        wanted: dict[str, tuple[int, ...]] = {}
        for param in listed(spec, spec.vocab_size)[0]:
            if adapted_by(param.name) is not None:
                names = their_names(self.family, param.name)
                wanted |= {each: (param.shape[0] // len(names), *param.shape[1:]) for each in names}
        held = {name: shape for name, shape in wanted.items() if name in self.shapes}
        wrong = [
            f"{name} has {self.shapes[name]}, not {shape}" for name, shape in held.items() if self.shapes[name] != shape
        ]
        other = [f"{name} ({self.dtypes[name]})" for name in held if self.dtypes[name] not in FLOATS]
        for fault, of in (
            ("lacks", [name for name in wanted if name not in held]),
            ("doesn't fit the model in model.init_from:", wrong),
            ("holds numbers that are none of fp32, fp16 and bf16:", other),
            ("holds tensors that such a model has no place for:", [name for name in self.shapes if name not in wanted]),
        ):
            refuse_tensors(self.path, fault, of, "Name an adapter of this base, or leave model.lora.init_from out.")


def open_adapter(spec: ModelSpec) -> AdapterFiles:
    """The adapter in `spec.lora.init_from`.

    Raises:
        UsageError: it is none of ours: of another kind, rank, scale, or of other modules.
        CheckpointCorrupt: its file can't be read.
    """
    assert spec.lora is not None and spec.lora.init_from is not None
    directory, lora = Path(spec.lora.init_from).expanduser(), spec.lora
    config = read_json(directory / CONFIG, "model.lora.init_from", OTHER_ADAPTER)
    other = [
        f"{key} {json.dumps(config[key])}"
        for key, neutral in NEUTRAL.items()
        if key in config and config[key] != neutral and not (neutral in EQUAL_TO_NONE and config[key] in EQUAL_TO_NONE)
    ]
    if other:
        raise _refused(directory, f"has {', '.join(other)}, which adapters here don't have", OTHER_ADAPTER)
    ours = {"r": lora.r, "lora_alpha": lora.lora_alpha, "target_modules": sorted(lora.target_modules)}
    modules = config.get("target_modules")
    theirs = {**config, "target_modules": sorted(modules) if isinstance(modules, list) else modules}
    differing = [
        f"{key} is {json.dumps(v)} and {json.dumps(theirs.get(key))}" for key, v in ours.items() if v != theirs.get(key)
    ]
    if differing:
        wrong = f"and the job's model.lora differ: {'; '.join(differing)[:500]}"
        raise _refused(directory, wrong, "Correct these keys of model.lora.")
    found = tensors_in(directory, [WEIGHTS])
    with safe_open(directory / WEIGHTS, framework="numpy") as opened:
        base = (opened.metadata() or {}).get(BASE, "")
    if base and lora.base_sha256 not in ("", base):
        wrong = f"is of other weights, SHA-256 {base[:12]}…, than those in model.init_from, {lora.base_sha256[:12]}…"
        raise refused(
            f"model.lora.init_from: {directory / WEIGHTS} {wrong}",
            "Name the base with which it was trained, or export it merged.",
        )
    return AdapterFiles(directory, family_of_spec(spec), found.shapes, found.dtypes)


def _refused(directory: Path, wrong: str, remedy: str) -> UsageError:
    return refused(f"model.lora.init_from: {directory / CONFIG} {wrong}", remedy)


# -- Writing -----------------------------------------------------------------------------------------------------------


def export_peft(checkpoint: Location, job: JobSpec, to: Path, of_ema: bool = False) -> int:
    """Write a run's adapters as the directory `to`, which must be new or empty and appears by a rename.

    Args:
        of_ema: the average of the weights in place of the weights.

    Returns:
        bytes of weights.

    Raises:
        UsageError: the run trains no adapters, or other weights too, keeps no average, or no family has its model.
    """
    refuse_used(to)
    if job.model.lora is None:
        raise _not_written(f"run {job.name} trains no adapters (model.lora)", "Export it with --format hf.")
    more = [pattern for pattern in job.train.trainable if ".lora." not in pattern]
    if more or job.model.bias_update_speed:
        moved = f"train.trainable {', '.join(more)}" if more else "the router's bias (model.bias_update_speed)"
        raise _not_written(f"run {job.name} trains other weights too: {moved}", "Export it merged, with --format hf.")
    refuse_missing_average(job, of_ema)
    family = family_of_spec(job.model)
    with CheckpointReader(checkpoint) as reader, new_directory(to) as directory:
        tensors = dict(_adapters(reader, family, of_ema))
        file = directory / WEIGHTS
        file.touch()  # keeps the umask's permissions; safetensors would make a file that only its owner can read
        mode = file.stat().st_mode
        save_file(tensors, file, {"format": "pt", BASE: job.model.lora.base_sha256})
        file.chmod(mode)
        (directory / CONFIG).write_text(json.dumps(_config(job), indent=2) + "\n")
    return sum(tensor.nbytes for tensor in tensors.values())


def _adapters(reader: CheckpointReader, family: Family, of_ema: bool) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    for key, entry in reader.manifest.tensors.items():
        kind, _, name = key.partition("/")
        if kind == MASTER and adapted_by(name) is not None:
            key = average_of(key) if of_ema else key
            names = their_names(family, name)
            whole = reader.read(key, 0, entry.numel).reshape(entry.shape)
            parts: Sequence[npt.NDArray[Any]] = np.split(whole, len(names))
            yield from ((theirs, np.ascontiguousarray(part)) for theirs, part in zip(names, parts, strict=True))


def _config(job: JobSpec) -> dict[str, object]:
    lora = job.model.lora
    assert lora is not None
    return {
        **NEUTRAL,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": job.model.init_from,
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": list(lora.target_modules),
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _not_written(reason: str, remedy: str) -> UsageError:
    return UsageError(reason, remedy=remedy, unchanged="Nothing was written.")
