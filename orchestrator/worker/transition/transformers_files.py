"""The tensors of a directory that transformers has saved, by the names of a model that transformers builds.

Published files name tensors otherwise than the model in memory, in which the experts of a layer are stacked;
transformers keeps the rules for both ways (`transformers.conversion_mapping`), and they are followed here.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.hf.pretrained import Part, refuse_tensors
from orchestrator.checkpoint.hf.tensor_listing import Listing, list_tensors
from orchestrator.errors import CheckpointCorrupt
from orchestrator.model.base import TrainableModel, meta_device
from orchestrator.model.factory import build_model, single_rank
from orchestrator.model.transformers_impl.transformers_model import PREFIX, meta_model, their_name
from orchestrator.spec.model import ModelSpec

_STACKING = ("MergeModulelist", "Concatenate")


class TransformersFiles:
    """Where the tensors of a model are.

    Args:
        spec: of the model, with `impl: transformers` and its config.
        directory: as `save_pretrained` writes it.

    Raises:
        CheckpointCorrupt: a file is missing or truncated.
    """

    def __init__(self, spec: ModelSpec, directory: Path) -> None:
        assert spec.vocab_size is not None
        self._spec, self._path = spec, directory
        self._listing: Listing = list_tensors(directory)
        self._model = meta_model(spec, spec.vocab_size)
        self._wanted: dict[str, tuple[int, ...]] = {n: tuple(t.shape) for n, t in self._model.state_dict().items()}
        self._whole, self._stacked = self._places()

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """By names in the files."""
        return self._listing.shapes

    def parts(self, name: str) -> tuple[Part, ...]:
        """Parts of one of our tensors, in the order of their rows. Raises KeyError if the directory lacks it."""
        their, expert = their_name(name)
        if expert is None or their in self._whole:
            return (self._part(self._whole[their], expert),)
        return tuple(self._part(key) for key in self._stacked[their][expert])

    def check(self) -> None:
        """Raises CheckpointCorrupt, which names tensors that are missing, unexpected, or of another shape."""
        with meta_device():
            ours: TrainableModel = build_model(self._spec, self._spec.vocab_size or 0, single_rank(self._spec))
        missing, wrong = [], []
        for name, tensor in (*ours.named_parameters(), *ours.state_buffers()):
            try:
                shapes = [self.shapes[p.key][0 if p.index is None else 1 :] for p in self.parts(name)]
            except (KeyError, IndexError):
                missing.append(name.removeprefix(PREFIX))
                continue
            rows = sum(shape[0] for shape in shapes)
            if {shape[1:] for shape in shapes} != {tuple(tensor.shape[1:])} or rows != len(tensor):
                wrong.append(f"{name.removeprefix(PREFIX)} ({list(tensor.shape)} wanted)")
        unexpected = [name for name in self._whole if name not in self._wanted and not self._is_ignored(name)]
        refuse_tensors(self._path, "lacks", missing)
        refuse_tensors(self._path, "doesn't match its config.json:", wrong)
        refuse_tensors(self._path, "holds tensors that such a model has no place for:", unexpected)

    def _part(self, key: str, index: int | None = None) -> Part:
        return Part(self._path / self._listing.files[key], key, index)

    def _is_ignored(self, name: str) -> bool:
        """Whether transformers ignores it too."""
        patterns = self._model._keys_to_ignore_on_load_unexpected or ()
        is_tied = name in (self._model._tied_weights_keys or {}) and self._model.config.tie_word_embeddings
        return is_tied or any(re.search(pattern, name) for pattern in patterns)

    def _places(self) -> tuple[dict[str, str], dict[str, list[tuple[str, ...]]]]:
        """Keys in the files of whole tensors of the model in memory, and of the parts of its stacked experts."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key

        rules = get_model_conversion_mapping(self._model)
        converters: list[Any] = [rule for rule in rules if isinstance(rule, WeightConverter)]
        renamings: list[Any] = [rule for rule in rules if not isinstance(rule, WeightConverter)]
        whole: dict[str, str] = {}
        found: dict[str, dict[tuple[int, int], str]] = {}
        for key in self._listing.files:
            base, known = self._model.base_model_prefix, self._wanted
            name, pattern = rename_source_key(key, renamings, converters, base, known)
            if pattern is None:
                whole[name] = key
                continue
            converter = next(each for each in converters if pattern in each.source_patterns)
            kinds = [type(operation).__name__ for operation in converter.operations]
            number = re.search(pattern.replace(".", r"\.").replace("*", r"(\d+)"), _renamed(key, renamings))
            if not set(kinds) <= set(_STACKING) or number is None:
                raise CheckpointCorrupt(
                    f"{self._path}: {key} becomes a tensor of the model by {', '.join(kinds)}, which is not supported",
                    remedy="Load and save it with transformers, save_pretrained(…, save_original_format=False).",
                )
            found.setdefault(name, {})[int(number[1]), converter.source_patterns.index(pattern)] = key
        stacked = {}
        for name, keys in found.items():
            parts = 1 + max(part for _, part in keys)
            experts = 1 + max(expert for expert, _ in keys)
            stacked[name] = [tuple(keys[e, part] for part in range(parts) if (e, part) in keys) for e in range(experts)]
        return whole, stacked


def _renamed(key: str, renamings: list[Any]) -> str:
    from transformers.core_model_loading import apply_renamings

    return str(apply_renamings(key, renamings))
