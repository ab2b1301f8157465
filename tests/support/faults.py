"""Faults at an exact (rank, step, moment) of real workers, made inside their own processes.

    worker_group.arm(Fault(2, Moment.VOTE, step=6), Fault(1, Moment.MOVE, generation=1))

Every worker gets the whole table, as its rank is known only in a generation; whose turn it is kills its own process
there, which gives nobody a last word. `arm` wraps the functions that mark the moments, in the calling process alone:
the product knows nothing of it and imports nothing from here.
"""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from types import SimpleNamespace
from typing import Any

from orchestrator.comm.transport import stream
from orchestrator.protocol.messages import GenerationPlan


class Moment(StrEnum):
    """The first five are of a step, the others of a generation to come."""

    FORWARD = "before the step's first micro-batch"
    UPDATE = "right before the optimizer changes the state"
    VOTE = "updated, and not yet voted"
    VOTED = "its own vote has returned"
    SNAPSHOT = "half of the step's snapshot is with its buddy"
    PREPARE = "before it connects to its peers"
    MOVE = "connected, and before it gives or takes any state"
    READY = "has its new shard, and nothing is activated"
    ACTIVATED = "has heard of the activation, and has done no step"


@dataclass(frozen=True)
class Fault:
    """The rank is that of the generation in which the step is done, or of the one to come.

    A `step` or `generation` of None is any. `flips`: the process lives on, and a bit of its first element of this
    tensor (a prefix of its name) has changed, once.
    """

    rank: int
    moment: Moment
    step: int | None = None
    generation: int | None = None
    by: signal.Signals = signal.SIGKILL
    flips: str = ""


_armed: tuple[Fault, ...] = ()
_rank = -1  # in the generation whose step was begun last


def arm(faults: tuple[Fault, ...]) -> None:
    """From now on these faults happen in this process, and no earlier ones."""
    global _armed
    if not _wrapped:
        _wrap()
    _armed = faults


def disarm() -> None:
    """No faults any more."""
    global _armed
    _armed = ()


def _due(rank: int, moment: Moment, step: int | None = None, generation: int | None = None) -> Fault | None:
    for fault in _armed:
        fits = fault.step in (None, step) and fault.generation in (None, generation)
        if (fault.rank, fault.moment) == (rank, moment) and fits:
            return fault
    return None


def _strike(rank: int, moment: Moment, shard: Any = None, **at: int) -> None:
    global _armed
    if (fault := _due(rank, moment, **at)) is None:
        return
    if not fault.flips:
        os.kill(os.getpid(), fault.by)
    _armed = tuple(other for other in _armed if other != fault)  # the step may be done again
    flip_bit(next(held.data for name, held in shard.engine.idle_state() if name.startswith(fault.flips)))


def flip_bit(values: Any, bit: int = 10) -> None:
    """Change a bit of the mantissa of a flat fp32 tensor's first element."""
    import torch

    values.view(torch.int32)[0] ^= 1 << bit


# -- the moments -----------------------------------------------------------------------------------------------------

_wrapped: list[str] = []


def _wrap() -> None:
    from orchestrator.worker.step.train_step import TrainStep
    from orchestrator.worker.transition import preparation, rescaler

    for owner, name, around in (
        (TrainStep, "step", _around_step),
        (stream.FramedStream, "send", _around_send),
        (preparation, "prepare", _around_prepare),
        (rescaler, "make_transition", _around_move),
        (preparation.TransitionPreparer, "await_activation", _around_activation),
    ):
        setattr(owner, name, around(getattr(owner, name)))
        _wrapped.append(name)


def _around_step(original: Callable[..., Any]) -> Callable[..., Any]:
    def step(self: Any, shard: Any, progress: Any, hooks: Any, keep_gradients: bool) -> Any:
        global _rank
        _rank = shard.rank
        at = {"step": progress.step + 1, "generation": shard.world.generation}
        _strike(_rank, Moment.FORWARD, shard, **at)

        def updating() -> None:
            hooks.before_update()
            _strike(_rank, Moment.UPDATE, shard, **at)

        def proposing(step: int) -> Any:
            proposal = hooks.propose(step)
            _strike(_rank, Moment.VOTE, shard, **at)
            return proposal

        around = SimpleNamespace(
            wait_for_rows=hooks.wait_for_rows,
            before_micro_batch=hooks.before_micro_batch,
            before_update=updating,
            propose=proposing,
        )
        stepped = original(self, shard, progress, around, keep_gradients)
        _strike(_rank, Moment.VOTED, shard, **at)
        return stepped

    return step


def _around_send(original: Callable[..., Any]) -> Callable[..., Any]:
    def send(self: Any, header: dict[str, Any], body: memoryview) -> None:
        at = {"step": header["step"], "generation": header["generation"]}
        if _due(_rank, Moment.SNAPSHOT, **at) is not None:
            text = json.dumps(header).encode()
            self._socket.sendall(stream._LENGTHS.pack(len(text), len(body)) + text + bytes(body[: len(body) // 2]))
            _strike(_rank, Moment.SNAPSHOT, **at)
        original(self, header, body)

    return send


def _around_prepare(original: Callable[..., Any]) -> Callable[..., Any]:
    def prepare(factory: Any, plan: GenerationPlan) -> Any:
        _strike(_rank_in(plan, factory.me), Moment.PREPARE, generation=plan.generation)
        return original(factory, plan)

    return prepare


def _around_move(original: Callable[..., Any]) -> Callable[..., Any]:
    def move(factory: Any, prepared: Any, *args: Any) -> Any:
        plan = prepared.plan
        _strike(_rank_in(plan, factory.me), Moment.MOVE, generation=plan.generation)
        return original(factory, prepared, *args)

    return move


def _around_activation(original: Callable[..., Any]) -> Callable[..., Any]:
    def await_activation(self: Any, plan: GenerationPlan) -> int:
        rank = _rank_in(plan, self._factory.me)
        _strike(rank, Moment.READY, generation=plan.generation)
        activated = int(original(self, plan))
        if activated == plan.generation:
            _strike(rank, Moment.ACTIVATED, generation=plan.generation)
        return activated

    return await_activation


def _rank_in(plan: GenerationPlan, me: str) -> int:
    """-1 for a worker that leaves."""
    return plan.world.rank_of(me) if me in plan.world else -1
