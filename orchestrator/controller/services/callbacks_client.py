"""Client of the process in which a run's callbacks are called. It follows the run by itself; here it is kept alive."""

import logging
import time
from concurrent.futures import Future
from functools import partial
from typing import Protocol

from orchestrator.cluster.actors import ActorOptions, find, start_host
from orchestrator.cluster.calls import has_ended, reason_of
from orchestrator.cluster.inbox import Inbox, post
from orchestrator.cluster.remote import Remote
from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.location import Location
from orchestrator.storage.backends.log_target import LogTarget

log = logging.getLogger("orchestrator.control")

NAME = "callbacks"
LOOK_EVERY_S = 5.0
FINISH_S = 30.0  # that the run's end waits for its callbacks
LAST_TRIES = 2  # to have them called for the end


class CallbacksApi(Protocol):
    """Methods of `orchestrator.callback_process.callback_runner.CallbackRunner` that a controller calls."""

    def warning(self) -> str: ...

    def finish(self, outcome: str, reason: str, timeout_s: float) -> bool: ...


class CallbacksClient:
    """Starts or finds the process, if the job has callbacks, and asks it what is wrong.

    Args:
        target: dotted name of its class.
    """

    def __init__(self, run_id: str, run_dir: Location, job: JobSpec, target: str, inbox: Inbox) -> None:
        self._run_id, self._run_dir, self._job = run_id, run_dir, job
        self._target, self._inbox = target, inbox
        self._runner: Remote[CallbacksApi] | None = None
        self._looked_s = 0.0
        self.warning: str | None = None

    @property
    def _name(self) -> str:
        return f"{self._run_id}/{NAME}"

    def tend(self, now_s: float) -> None:
        """Start or find the process, and ask it at intervals."""
        if not self._job.callbacks or now_s - self._looked_s < LOOK_EVERY_S:
            return
        self._looked_s = now_s
        runner = self._started()
        post(self._inbox, runner.send(CallbacksApi.warning), partial(self._answered, runner))

    def end(self) -> None:
        """End the process: a run without workers commits no steps."""
        if self._runner is not None:
            self._runner.kill()
            self._runner, self.warning = None, None

    def close(self, outcome: str, why: str) -> None:
        """Let the callbacks have the last steps and the run's end. One that takes longer is left behind."""
        if not self._job.callbacks:
            return
        for _ in range(LAST_TRIES):
            try:
                runner = self._started().within(FINISH_S + 5.0)
                if not runner.ask(CallbacksApi.finish, outcome, why, FINISH_S):
                    seen = runner.ask(CallbacksApi.warning)
                    log.warning("callbacks have not ended within %.0f s: %s", FINISH_S, seen)
                return
            except Exception as error:  # of any kind: the run's end must not depend on it
                log.warning("callbacks did not see the run's end: %s", error)
                self._runner = None  # it may have been killed

    def _started(self) -> Remote[CallbacksApi]:
        if self._runner is None:
            actor_options = ActorOptions(
                env=self._job.envs, logs=LogTarget(self._run_dir, NAME), max_restarts=-1, storage_process=True
            )
            args = (self._run_id, str(self._run_dir), self._job)
            self._runner = start_host(self._name, self._target, args, actor_options).hosted()
        return self._runner

    def _answered(self, runner: Remote[CallbacksApi], answer: "Future[str]") -> None:
        if runner is not self._runner:  # ended meanwhile
            return
        if (error := answer.exception()) is None:
            self.warning = answer.result() or None
            return
        self.warning = f"callbacks are not called: {reason_of(error)}"
        if has_ended(error) and find(self._name) is None:
            self._runner, self._looked_s = None, time.monotonic()
