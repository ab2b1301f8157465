"""Import and calls of a user's code, with its exceptions reported as its own."""

import importlib
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from orchestrator import user_code
from orchestrator.errors import EntrypointError
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.spec.model import ModelSpec

Build = Callable[[ModelSpec, int, ExpertParallelContext], nn.Module]


def built(spec: ModelSpec, vocab_size: int, home: ExpertParallelContext, seed: int) -> nn.Module:
    """The module that the entrypoint builds, with torch's random numbers seeded meanwhile.

    Raises:
        EntrypointError: it can't be imported, raises, or returns no module.
    """
    build = _loaded(spec)
    with torch.random.fork_rng(), calling_user(f"{spec.entrypoint}"):
        torch.manual_seed(seed)
        module = build(spec, vocab_size, home)
    if not isinstance(module, nn.Module):
        raise EntrypointError(
            f"model.entrypoint {spec.entrypoint} returned a {type(module).__name__}",
            remedy="It must return a torch.nn.Module that maps tokens to logits.",
        )
    return module


@contextmanager
def calling_user(what: str) -> Iterator[None]:
    """Turn exceptions of the user's code into EntrypointErrors with its traceback; memory errors pass unchanged."""
    try:
        yield
    except (EntrypointError, MemoryError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        raise EntrypointError(
            f"{what} raised {type(error).__name__}: {error}", traceback=_traceback_of(error), remedy="Fix your code."
        ) from error


def _loaded(spec: ModelSpec) -> Build:
    """The function that the entrypoint names."""
    assert spec.entrypoint is not None
    directory = Path(spec.code_dir).absolute()
    module_name, _, name = spec.entrypoint.partition(":")
    try:
        module = user_code.imported(module_name, directory)
    except (Exception, SystemExit) as error:
        raise EntrypointError(
            f"model.entrypoint {spec.entrypoint} can't be imported: {type(error).__name__}: {error}",
            traceback=_traceback_of(error),
            remedy=f'`python -c "import {module_name}"` must work in {directory}; model.code_dir names another one.',
        ) from error
    build = getattr(module, name, None)
    if not callable(build):
        raise EntrypointError(
            f"model.entrypoint {spec.entrypoint}: {module.__file__} has no function {name}",
            remedy=f"It must name a function of that module{_nearest(name, module)}.",
        )
    return build  # type: ignore[no-any-return]


def _nearest(name: str, module: ModuleType) -> str:
    functions = [other for other, value in vars(module).items() if callable(value)]
    nearest = get_close_matches(name, functions, n=1)
    return f"; nearest: {nearest[0]}" if nearest else ""


def _traceback_of(error: BaseException) -> str:
    """The error's traceback without the frames above the user's code (ours and importlib's)."""
    frames = error.__traceback__
    while frames is not None and _is_ours(frames):
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames))


def _is_ours(frames: Any) -> bool:
    file: str = frames.tb_frame.f_code.co_filename
    ours = (str(Path(__file__).parent), str(Path(importlib.__file__).parent), str(user_code.__file__))
    return file.startswith(("<frozen importlib", *ours))
