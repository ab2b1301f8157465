"""Process of a run's callbacks: follows the journal in run storage, calls them, and passes on what they request.

Training waits for none of it, and no error of a callback ends the run: such a callback is called no more, which the
run's status shows.
"""

import json
import logging
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from orchestrator.callback import Callback, Json, Pause, Request, SaveCheckpoint, Scale, Step, Stop, made
from orchestrator.callback_process.callback_position import Position, read_position, read_steps_after, store_position
from orchestrator.cluster.published.published_keys import signer_in_cluster
from orchestrator.code_package import of_user, placed
from orchestrator.errors import ClusterUnreachable, NotFinished, OrchestratorError
from orchestrator.requirements import use_requirements
from orchestrator.scheduler.scheduler import Scheduler
from orchestrator.scheduler.scheduler_actor import get_or_create_scheduler
from orchestrator.secrets import redacted, take_secrets
from orchestrator.spec.job import JobSpec
from orchestrator.spec.own_callbacks import CallbackSpec
from orchestrator.storage.backends.location import location_of
from orchestrator.storage.backends.signing_keys import hold_key
from orchestrator.storage.caller import Caller

log = logging.getLogger("orchestrator.callback_process")

READ_EVERY_S = 1.0
STORE_EVERY_S = 10.0
INSTALL_AGAIN_S = 60.0
SLOW_S = 30.0  # a call that lasts longer shows in the run's status


class _Called:
    """A callback that is called until it raises."""

    def __init__(self, spec: CallbackSpec, state: dict[str, Json] | None) -> None:
        self.name = spec.entrypoint
        self.error = ""
        self.since_s: float | None = None  # when the call that lasts began
        self._state = state  # the newest that is known
        self._callback: Callback | None = self._guarded("its construction", lambda: made(spec))
        if state is not None:
            self._call("load_state_dict", lambda callback: callback.load_state_dict(state))

    def state(self) -> dict[str, Json] | None:
        """Its state now; the newest one of a callback that has raised. None: it has given none."""
        found: dict[str, Json] | None = self._call("state_dict", lambda callback: _plain(callback.state_dict()))
        self._state = self._state if found is None else found
        return self._state

    def step(self, step: Step) -> Request | None:
        request: Request | None = self._call(f"on_step of step {step.step}", lambda callback: callback.on_step(step))
        if request is None or isinstance(request, Request):
            return request
        self._end(f"on_step of step {step.step} returned a {type(request).__name__}, which is no request")
        return None

    def end(self, outcome: str, reason: str) -> None:
        self._call("on_end", lambda callback: callback.on_end(outcome, reason))

    @property
    def trouble(self) -> str:
        """What is wrong with it, in words; empty if nothing is."""
        if self.error:
            return f"the callback {self.name} is called no more: {self.error}"
        lasts_s = 0.0 if self.since_s is None else time.monotonic() - self.since_s
        return f"the callback {self.name} has not returned for {lasts_s:.0f} s" if lasts_s > SLOW_S else ""

    def _call(self, what: str, call: Callable[[Callback], Any]) -> Any:
        callback = self._callback
        return None if callback is None else self._guarded(what, lambda: call(callback))

    def _guarded(self, what: str, call: Callable[[], Any]) -> Any:
        self.since_s = time.monotonic()
        try:
            return call()
        except (Exception, SystemExit) as error:
            log.error("callback %s: %s", self.name, "".join(traceback.format_exception(error)))
            self._end(of_user(redacted(f"{what} raised {type(error).__name__}: {error}")))
            return None
        finally:
            self.since_s = None

    def _end(self, error: str) -> None:
        self.error, self._callback = error, None


def _plain(state: object) -> dict[str, Json]:
    """What reading a stored state will give. Raises TypeError or ValueError if it can't be stored."""
    if not isinstance(state, dict):
        raise TypeError(f"it returned a {type(state).__name__}; a dict is needed")
    found: dict[str, Json] = json.loads(json.dumps(state))
    return found


class CallbackRunner:
    """Runs the callbacks of one run, in a thread.

    Args:
        caller: makes calls to run storage, so that this process can be killed during them.
    """

    def __init__(
        self,
        run_id: str,
        run_dir: str,
        job: JobSpec,
        caller: Caller,
    ) -> None:
        self._run_id, self._run_dir, self._job, self._caller = run_id, run_dir, job, caller
        self._called: list[_Called] = []
        self._position = self._stored = Position()
        self._stored_s = time.monotonic()
        self._requests: list[Request] = []  # not passed on yet
        self._has_passed_on = False  # some since the position was stored
        self._is_ending = False  # a callback has requested the run's end, or it is ending
        self._has_called_end = False
        self._waits = ""  # why nothing goes on
        self._refused = ""  # why the newest request was refused
        self._end: tuple[str, str] | None = None  # of the run: outcome and reason
        self._changed, self._has_ended = threading.Event(), threading.Event()
        threading.Thread(target=self._work, name="callbacks", daemon=True).start()

    def warning(self) -> str:
        """What is wrong, in words; empty if nothing is."""
        return next(filter(None, [called.trouble for called in self._called]), "") or self._waits or self._refused

    def finish(self, outcome: str, reason: str, timeout_s: float) -> bool:
        """Call the callbacks for the remaining steps and the run's end. Returns whether that was done in time."""
        self._end = (outcome, reason)
        self._changed.set()
        return self._has_ended.wait(timeout_s)

    def _work(self) -> None:
        begins = [self._take_secrets, self._use_requirements, self._begin]
        while True:
            end = self._end  # looked at before reading: all steps are there then
            try:
                while begins:
                    begins[0]()
                    begins.pop(0)
                self._read_on()
                self._pass_on()  # before the position is stored: a successor would request the same again
                if end is not None:
                    self._call_end(*end)
                self._store(is_due=end is not None)
                if end is not None:
                    self._has_ended.set()
                    return
                self._waits = ""
            except (OSError, OrchestratorError) as error:
                self._waits = f"callbacks wait: {error}"
                log.warning("%s", self._waits)
            except Exception as error:  # of any kind: it is shown, and tried again
                self._waits = f"callbacks wait: {error!r}"
                log.exception("callbacks wait")
            self._changed.wait(INSTALL_AGAIN_S if self._use_requirements in begins else READ_EVERY_S)
            self._changed.clear()

    def _take_secrets(self) -> None:
        take_secrets(self._job.secrets)

    def _use_requirements(self) -> None:
        use_requirements(self._job.pip)

    def _begin(self) -> None:
        """Go on from where an earlier process was."""
        run_dir = location_of(self._run_dir)
        if (key := signer_in_cluster(run_dir)) is not None:
            hold_key(run_dir, key)
        self._position = self._stored = self._caller(read_position, self._run_dir)
        states = dict(self._position.states)
        specs = placed(self._job, run_dir, self._caller).callbacks
        self._called = [_Called(spec, states.get(spec.entrypoint)) for spec in specs]

    def _read_on(self) -> None:
        """Call the callbacks for new steps."""
        for read in self._caller(read_steps_after, self._run_dir, self._position):
            for step in read.steps:
                for called in self._called:
                    if (request := called.step(step)) is not None:
                        log.info("%s after step %d: %s", called.name, step.step, request)
                        self._requests.append(request)
            self._position = replace(self._position, seq=read.seq, step=read.newest)

    def _store(self, is_due: bool) -> None:
        """Store the position, if it is a new one, after a while or when it `is_due`."""
        is_due |= self._has_passed_on or time.monotonic() - self._stored_s >= STORE_EVERY_S
        if self._position.seq > self._stored.seq and is_due:
            states = tuple((c.name, state) for c in self._called if (state := c.state()) is not None)
            self._position = replace(self._position, states=states)
            self._caller(store_position, self._run_dir, self._position)
            self._stored, self._stored_s, self._has_passed_on = self._position, time.monotonic(), False

    def _pass_on(self) -> None:
        """Pass on requests, the oldest first. One that is refused is dropped; a cluster that doesn't answer is asked
        again."""
        while self._requests:
            request = self._requests[0]
            try:
                if not self._is_ending:
                    self._ask(request)
                    self._refused, self._is_ending = "", isinstance(request, Stop | Pause)
            except ClusterUnreachable:
                raise
            except NotFinished as error:  # it is accepted
                log.info("%s", error)
                self._is_ending = isinstance(request, Stop | Pause)
            except OrchestratorError as error:
                self._refused = f"a callback's request {request} was refused: {error}"
                log.warning("%s", self._refused)
            del self._requests[0]
            self._has_passed_on = True

    def _ask(self, request: Request) -> None:
        scheduler = get_or_create_scheduler()
        match request:
            case Scale(workers, reason):
                scheduler.ask(Scheduler.scale, self._run_id, workers, reason)
            case Stop(reason):
                scheduler.ask(Scheduler.stop, self._run_id, reason)
            case Pause(reason):
                scheduler.ask(Scheduler.pause, self._run_id, reason)
            case SaveCheckpoint(reason):
                scheduler.ask(Scheduler.checkpoint, self._run_id, reason)

    def _call_end(self, outcome: str, reason: str) -> None:
        """Call the callbacks for the run's end, unless they were called for it."""
        for called in self._called if not self._has_called_end else ():
            called.end(outcome, reason)
        self._has_called_end = True
