"""The `callbacks` section: code of the user's that follows a run's committed steps."""

from collections.abc import Iterator

from pydantic import Field, JsonValue

from orchestrator.spec.keys.section import HERE, Broken, CodeDir, Section
from orchestrator.spec.task import Entrypoint


class CallbackSpec(Section):
    """A callback: called for every committed step, in a process of its own, from which it may steer the run."""

    entrypoint: Entrypoint = Field(
        description='A function "package.module:function" that makes a callback of `options` (docs/callbacks.md).'
    )
    options: dict[str, JsonValue] = Field(default={}, description="Keys for `entrypoint`, of your own choice.")
    code_dir: CodeDir = HERE


def broken_callbacks(callbacks: list[CallbackSpec]) -> Iterator[Broken]:
    """The rule between the callbacks of a job: their states are kept by their entrypoints."""
    names = [callback.entrypoint for callback in callbacks]
    for i, name in enumerate(names):
        if name in names[:i]:
            yield Broken((("callbacks", i, "entrypoint"),), f"callbacks names {name} twice; give it another function")
