"""Tensors of a directory saved by `transformers`: names, shapes and number formats, from the headers of its files."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from orchestrator.errors import CheckpointCorrupt, UsageError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NAMED_AT_MOST = 8  # tensors in a message
OTHER_DIRECTORY = (
    "Name a directory that `orchestrator model export` has written, or `save_pretrained` of a family in "
    "docs/pretrained.md; for other mixtures of transformers set model.impl: transformers."
)


@dataclass(frozen=True)
class Listing:
    """File, shape and number format of every tensor of a directory, by its name there."""

    files: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]


def list_tensors(directory: Path) -> Listing:
    """List the tensors of a directory, from the files' headers. Raises CheckpointCorrupt: a file is missing, truncated,
    or not of the format that its name implies."""
    index = directory / INDEX
    if index.exists():
        named = read_json(index).get("weight_map")
        if not isinstance(named, dict) or not all(_is_plain(file) for file in named.values()):
            raise _broken(f"{index} has no weight_map that names files beside it")
    elif (directory / WEIGHTS).exists():
        named = None
    else:
        raise _broken(f"{directory} holds neither {WEIGHTS} nor {INDEX}")
    found = tensors_in(directory, sorted(set(named.values())) if named is not None else [WEIGHTS])
    lost = [name for name, file in (named or {}).items() if found.files.get(name) != file]
    if lost:
        raise _broken(f"{index} names tensors that its files lack: {', '.join(lost[:NAMED_AT_MOST])}")
    return found


def tensors_in(directory: Path, names: Sequence[str]) -> Listing:
    """List the tensors of some files of a directory. Raises CheckpointCorrupt as `list_tensors`."""
    files: dict[str, str] = {}
    found_shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    for file in names:
        try:
            with safe_open(directory / file, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no dict
                    header = opened.get_slice(name)
                    files[name] = file
                    found_shapes[name], dtypes[name] = tuple(header.get_shape()), header.get_dtype()
        except (SafetensorError, OSError) as error:
            raise _broken(f"{directory / file} can't be read: {error}") from error
    return Listing(files, found_shapes, dtypes)


def read_json(path: Path, key: str = "model.init_from", remedy: str = OTHER_DIRECTORY) -> dict[str, Any]:
    """The object in a file of the directory that a key of the job names. Raises UsageError with this remedy."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise refused(f"{key}: {path} can't be read: {error.strerror}", remedy) from error
    except ValueError as error:
        raise refused(f"{key}: {path} is not JSON: {error}", remedy) from error
    if not isinstance(content, dict):
        raise refused(f"{key}: {path} is a JSON {type(content).__name__}; it must be an object", remedy)
    return content


def _is_plain(file: object) -> bool:
    return isinstance(file, str) and Path(file).name == file


def refused(message: str, remedy: str) -> UsageError:
    return UsageError(message, remedy=remedy, unchanged="Nothing was started.")


def _broken(message: str) -> CheckpointCorrupt:
    return CheckpointCorrupt(
        message, remedy="Fetch or save the directory again, whole.", unchanged="Nothing was started."
    )
