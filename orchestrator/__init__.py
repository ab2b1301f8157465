"""Elastic mixture-of-experts training on Ray. Names are loaded on first use, so that importing the package loads
neither Ray nor torch. `__init__.pyi` has the same names for type checkers."""

from importlib import import_module

_HOMES = {"ElasticTrainer": "orchestrator.ray_train.trainer", "OrchestratorClient": "orchestrator.client"}

__all__ = ["ElasticTrainer", "OrchestratorClient"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
