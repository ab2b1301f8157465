"""Directory of a model saved by `transformers`, as the initial weights of a run.

Torch-free, so that a submission can check it: only `config.json`, the index and the headers of the weights' files are
read. `orchestrator.worker.transition.load_state` reads the weights. Experts may be stored one by one or stacked.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from orchestrator.checkpoint.hf.families import family_of_config
from orchestrator.checkpoint.hf.family import Family
from orchestrator.checkpoint.hf.shapes import shapes
from orchestrator.checkpoint.hf.tensor_listing import NAMED_AT_MOST, OTHER_DIRECTORY, list_tensors, read_json, refused
from orchestrator.checkpoint.hf.transformers_config import OF_TRAINING, transformers_settings
from orchestrator.elastic.state_spec import adapted_by
from orchestrator.errors import CheckpointCorrupt, UsageError
from orchestrator.spec.keys.section import Section
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.pretrained.config_json import OF_EXPERTS, UPCYCLED

CONFIG = "config.json"
FLOATS = ("F32", "F16", "BF16")
OTHER_CONFIG = "Correct model.config, or the config.json in model.init_from."
DUE_TO_OTHERS = "default_factory_not_called"  # pydantic's error for a default that follows from a wrong value
_BEYOND = re.compile(r"model\.layers\.(\d+)\..*")
_EXPERT, _ROUTER = re.compile(r"\.mlp\.experts\.\d+\."), ".mlp.router."
_UNUSED = re.compile(r".*\.rotary_emb\.inv_freq")  # older versions of transformers saved this computed table


@dataclass(frozen=True)
class Part:
    """A tensor in a file, or one matrix of it where experts are stacked."""

    file: Path
    key: str
    index: int | None = None


@dataclass(frozen=True)
class Pretrained:
    """File, shape and number format of every tensor of the directory, by its name in transformers.

    Args:
        tied: the head shares the embedding's weights; ours becomes a copy, which is trained separately.
    """

    path: Path
    family: Family
    files: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    tied: bool

    def parts(self, name: str) -> tuple[Part, ...]:
        """Parts of one of our tensors, in the order of their rows; none of a buffer that the family doesn't have, of an
        upcycled model's router, or of an adapter. Raises KeyError if the directory lacks it."""
        dense = self._dense(name)
        if dense is None or adapted_by(name) is not None:
            return ()
        name = dense
        wanted = self.family.their_names("embedding.weight" if self.tied and name == "head" else name)
        stacked = self.family.stacked_name(name)
        if stacked is not None and stacked[0] in self.files:
            return (Part(self.path / self.files[stacked[0]], *stacked),)
        return tuple(Part(self.path / self.files[theirs], theirs) for theirs in wanted)

    def check(self, spec: ModelSpec) -> None:
        """Raises CheckpointCorrupt, which names tensors that are missing, unexpected, or of another shape or format."""
        assert spec.vocab_size is not None
        wanted: dict[str, tuple[int, ...]] = {}
        for ours, shape in shapes(spec, spec.vocab_size):
            name = self._dense(ours)
            if name is None:
                continue
            stacked = self.family.stacked_name(name)
            if self.tied and name == "head":
                continue
            if stacked is not None and stacked[0] in self.files:
                wanted[stacked[0]] = (spec.n_routed_experts, *shape)
                continue
            names = self.family.their_names(name)
            wanted |= {each: (shape[0] // len(names), *shape[1:]) for each in names}
        refuse_tensors(self.path, "lacks", [name for name in wanted if name not in self.files])
        held = [name for name in wanted if name in self.files]
        wrong = [f"{n} has {self.shapes[n]}, not {wanted[n]}" for n in held if self.shapes[n] != wanted[n]]
        refuse_tensors(self.path, "doesn't match its config.json:", wrong)
        other = [f"{n} ({self.dtypes[n]})" for n in held if self.dtypes[n] not in FLOATS]
        refuse_tensors(self.path, "holds numbers that are none of fp32, fp16 and bf16:", other)
        over = [name for name in self.files if name not in wanted and not self._ignored(name, spec)]
        refuse_tensors(self.path, "holds tensors that such a model has no place for:", over)

    def _dense(self, name: str) -> str | None:
        """The tensor whose values one of ours has: of a dense model that becomes a mixture an expert has those of the
        MLP, and a router has none."""
        if self.family.router is not None:
            return name
        return None if _ROUTER in name else _EXPERT.sub(".mlp.", name)

    def _ignored(self, name: str, spec: ModelSpec) -> bool:
        """Whether transformers ignores it too: multi-token prediction layers, RoPE tables, the head of a tied model."""
        beyond = _BEYOND.fullmatch(name)
        if beyond is not None and int(beyond[1]) >= spec.num_hidden_layers:
            return True
        return (self.tied and name == "lm_head.weight") or _UNUSED.fullmatch(name) is not None


def weights_digest(directory: Path) -> str:
    """SHA-256 of the directory's weights.

    Raises:
        CheckpointCorrupt: as `list_tensors`.
    """
    digest = hashlib.sha256()
    for name in sorted(set(list_tensors(directory).files.values())):
        with (directory / name).open("rb") as file:
            digest.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def check_base(spec: ModelSpec) -> None:
    """Check that the weights in `init_from` are those beside which a run's adapters were trained.

    Raises:
        UsageError: there is no such directory, or it has other weights.
    """
    if spec.lora is None or spec.init_from is None:
        return
    remedy = f"Bring back the model that the run began with, under {spec.init_from}."
    what = "the weights beside which the run's adapters were trained"
    check_weights(Path(spec.init_from), spec.lora.base_sha256, what, remedy, weights_digest)


def check_weights(directory: Path, sha256: str, what: str, remedy: str, digest_of: Callable[[Path], str]) -> None:
    """Check that a directory that a run goes on to read is as it was at submission.

    Args:
        sha256: empty if it isn't known.
        what: it has, for errors.

    Raises:
        UsageError: there is no such directory, or it has changed.
    """
    unchanged = "Nothing was started or written."
    if not directory.is_dir():
        reason = f"{directory} doesn't exist, and had {what}"
        raise UsageError(reason, remedy=remedy, unchanged=unchanged)
    found = digest_of(directory)
    if sha256 not in ("", found):
        reason = f"{directory} has changed: its SHA-256 is {found[:12]}…, and that of {what} {sha256[:12]}…"
        raise UsageError(reason, remedy=remedy, unchanged=unchanged)


def refuse_tensors(
    directory: Path,
    fault: str,
    names: Sequence[str],
    remedy: str = "Fetch or save the directory again, whole, or leave model.init_from out.",
) -> None:
    """Raises CheckpointCorrupt for a directory with a fault of these tensors; none: it has no such fault."""
    if names:
        more = f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else ""
        raise CheckpointCorrupt(
            f"{directory} {fault} {', '.join(names[:NAMED_AT_MOST])}{more}",
            remedy=remedy,
            unchanged="Nothing was started.",
        )


def resolved(
    spec: ModelSpec, directory: Path | None = None, key: str = "model.init_from", remedy: str = ""
) -> ModelSpec:
    """The model section, completed from the directory's `config.json`, or its own `config`; keys that the section sets
    must agree with it. Weights are not read.

    Args:
        key: of the job, that names the directory.
        remedy: if the directory can't be used; empty: that of `model.init_from`.

    Raises:
        UsageError: no such directory, another architecture, or differing values, all of which it names.
    """
    path = "model.config" if directory is None else directory / CONFIG
    remedy = remedy or (OTHER_CONFIG if spec.impl == "transformers" else OTHER_DIRECTORY)
    config = {} if directory is None else read_json(directory / CONFIG, key, remedy)
    try:
        found = _settings(spec, config)
        if spec.upcycle:
            found = _upcycled(spec, found)
    except UsageError as error:
        place = path if directory is None else f"{key}: {path}"
        raise refused(f"{place}: {error.message}", remedy) from error
    differing = [
        f"model.{key} is {_shown(getattr(spec, key))} and {_shown(value)}"
        for key, value in found.items()
        if key in spec.model_fields_set - {"config"} and _differs(getattr(spec, key), value)
    ]
    if differing:
        raise refused(
            f"the job and {path} differ: {'; '.join(differing)}",
            "Correct these keys of the job's model section, or leave them out: they are taken from there.",
        )
    of_directory = {} if directory is None else {"init_from": str(directory)}
    try:
        return ModelSpec.model_validate(spec.model_dump(exclude_unset=True) | found | of_directory)
    except ValidationError as error:
        own = (each for each in error.errors() if each["type"] != DUE_TO_OTHERS)
        wrong = "; ".join(f"{'.'.join(map(str, each['loc']))} {each['msg']}".strip() for each in own)
        raise refused(f"{path} is of a model that can't be trained: {wrong}", remedy) from error


def _settings(spec: ModelSpec, config: Mapping[str, Any]) -> dict[str, Any]:
    if spec.impl == "transformers":
        found = transformers_settings({**config, **spec.config})
        if spec.init_from is not None and "vocab_size" not in found:
            raise UsageError("it lacks vocab_size, the rows of its embedding")
        return {key: value for key, value in found.items() if key not in spec.model_fields_set & {*OF_TRAINING}}
    return family_of_config(config).settings(config)


def _upcycled(spec: ModelSpec, dense: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the mixture that a dense model becomes: what the job says of experts, and the rest as found."""
    if dense["first_k_dense_replace"] < dense["num_hidden_layers"]:
        raise UsageError("it is a mixture already, and model.upcycle is for a dense model")
    of_job = OF_EXPERTS - UPCYCLED.keys()
    first = spec.first_k_dense_replace if "first_k_dense_replace" in spec.model_fields_set else 0
    of_experts = {key: getattr(spec, key) for key in of_job} | {"first_k_dense_replace": first} | UPCYCLED
    return {**dense, **of_experts, "moe_intermediate_size": dense["intermediate_size"]}


def open_pretrained(directory: Path) -> Pretrained:
    """List the tensors of one of our families.

    Raises:
        UsageError: there is no `config.json`.
        CheckpointCorrupt: as `list_tensors`.
    """
    config = read_json(directory / CONFIG)
    family, tied = family_of_config(config), bool(config.get("tie_word_embeddings", False))
    found = list_tensors(directory)
    return Pretrained(directory, family, found.files, found.shapes, found.dtypes, tied)


def _shown(value: object) -> str:
    return json.dumps(value.model_dump(exclude_unset=True) if isinstance(value, Section) else value)


def _differs(ours: object, theirs: object) -> bool:
    if isinstance(ours, Section) and isinstance(theirs, dict):
        return ours != type(ours).model_validate(theirs)
    if isinstance(ours, float) and isinstance(theirs, int | float):
        return not math.isclose(ours, theirs, rel_tol=1e-9)
    return ours is not None and ours != theirs
