"""The worker hosted by a Ray actor process (`orchestrator.cluster.actors`), called from its control thread.

Every method but `warm` returns at once or within the caller's timeout. All computation runs in a separate thread, the
training thread, from warm-up on (`orchestrator.engine.threads`).
"""

import logging
import os
import signal
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

import psutil

from orchestrator.code_package import of_user, placed
from orchestrator.comm import collective_stats
from orchestrator.engine.numerics import fingerprint, kind_of_gpu, pin
from orchestrator.engine.threads import compute_here
from orchestrator.errors import EntrypointError, UsageError
from orchestrator.model.tasks.all_tasks import task_of
from orchestrator.model.trial.dry_run import is_small, rehearse
from orchestrator.protocol.changes import changed
from orchestrator.protocol.sent_directive import SentDirective
from orchestrator.protocol.worker_job import WorkerJob
from orchestrator.protocol.worker_phase import Phase
from orchestrator.protocol.worker_report import Report, WorkerError
from orchestrator.requirements import use_requirements
from orchestrator.secrets import redacted, take_secrets
from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.location import location_of
from orchestrator.storage.caller import Caller, call_here
from orchestrator.storage.log_file import flush_logs
from orchestrator.worker.runtime.device import check_float8, check_gpu_memory, device_of
from orchestrator.worker.runtime.mailbox import WorkerMailbox
from orchestrator.worker.shard.shard import ShardFactory
from orchestrator.worker.step.open_batches import open_batches, open_when_there
from orchestrator.worker.trainer import Trainer
from orchestrator.worker.transition.reserved_memory import ReservedMemory
from orchestrator.worker.transition.warmup import use_compiler, warm_up
from orchestrator.worker.whole_models.training_task import training_task

log = logging.getLogger("orchestrator.worker")

FLUSH_S = 1.0  # for the last line of the log
ORPHAN_TICK_S = 1.0


class Worker:
    """One worker of one run.

    Args:
        caller: makes the calls that write to run storage.
    """

    def __init__(self, worker_id: str, caller: Caller = call_here) -> None:
        self._id, self._caller = worker_id, caller
        self._process = psutil.Process()
        self._mailbox = WorkerMailbox(worker_id, os.getpid())
        self._last_heard = time.monotonic()
        self._warming = threading.Lock()
        self._trainer: Trainer | None = None
        self._training: threading.Thread | None = None
        if threading.current_thread() is threading.main_thread():  # as in an actor
            before = signal.getsignal(signal.SIGTERM)  # ends the process
            signal.signal(signal.SIGTERM, lambda *_: self._hear_sigterm(before))

    def warm(self, job: WorkerJob) -> Report:
        """Become a standby: import, build and drop a small engine, start the training thread. Idempotent."""
        self._heard()
        with self._warming:
            if self._mailbox.state.phase is Phase.COLD:
                self._mailbox.publish(phase=Phase.WARMING)
                standby: Future[None] = Future()
                self._training = threading.Thread(target=self._live, args=(job, standby), name="training", daemon=True)
                self._training.start()
                try:
                    standby.result()
                except UsageError as error:  # an error in the user's model, or a missing secret
                    trace = error.traceback if isinstance(error, EntrypointError) else ""
                    log.error("%s\n%s", trace, error)
                    self._mailbox.publish(phase=Phase.FAILED, error=WorkerError("user_error", str(error), trace))
                except Exception as error:
                    log.exception("%s could not warm up", self._id)  # the caller gets the error, the log its traceback
                    if (message := redacted(str(error))) != str(error):
                        raise RuntimeError(f"{type(error).__name__}: {message}") from None
                    raise
        return self.report(None, -1, 0.0)

    def direct(self, sent: SentDirective) -> Report:
        """Accept a directive; the newest wins. One with a plan that isn't known here is not accepted: the report shows
        an older one as seen. Raises TermSuperseded for a directive of a replaced controller."""
        self._heard()
        directive = sent.whole(self._mailbox.directive.plans)
        if directive is None:
            return self.report(None, -1, 0.0)
        if self._trainer is not None:  # first, so that it can't shut connections that the new directive asks for
            self._trainer.abort(directive.aborted)
            self._trainer.settle(directive.settled)
        self._mailbox.put(directive)
        return self.report(None, -1, 0.0)

    def report(
        self, after_step: int | None, known_version: int, timeout_s: float, published: int | None = None
    ) -> Report:
        """This worker's report, as soon as its version is above `known_version` or `timeout_s` have passed."""
        self._heard()
        report = self._mailbox.report(after_step, known_version, timeout_s, published)
        self._heard()
        if (error := report.health.error) is not None:
            message, traceback = of_user(redacted(error.message)), of_user(redacted(error.traceback))
            report = changed(report, error=replace(error, message=message, traceback=traceback))
        return changed(report, rss_bytes=self._process.memory_info().rss, collective=collective_stats.entered())

    def shutdown(self) -> None:
        """End this process. State that no other worker holds is lost."""
        log.info("%s shuts down", self._id)
        os._exit(0)

    def _live(self, job: WorkerJob, standby: "Future[None]") -> None:
        """Body of the training thread: warm up, then train to the end of the run."""
        try:
            trainer = self._become_standby(job)
        except BaseException as error:  # of any kind: `warm` waits for the outcome
            standby.set_exception(error)
            return
        standby.set_result(None)
        trainer.run()

    def _become_standby(self, job: WorkerJob) -> Trainer:
        """Do the work of `warm` in the training thread, since warm-up computes in parallel as steps do."""
        compute_here(job.threads)
        spec = JobSpec.model_validate_json(job.job_json)
        take_secrets(spec.secrets)
        use_requirements(spec.pip)
        run_dir = location_of(job.storage_dir)
        code = partial(placed, spec, run_dir, self._caller)
        spec = open_when_there(code, run_dir, self._mailbox.refuse_rows)
        device = device_of(spec.resources.num_gpus)
        if spec.train.is_exact:
            pin(device)
        if spec.train.float8:
            check_float8(device)
        compiler = use_compiler(spec, device) if spec.train.torch_compile else ""
        self._mailbox.publish(
            numerics=fingerprint(device, spec.model.libraries, spec.code, compiler)
            if spec.train.is_exact
            else kind_of_gpu(device)
        )
        own_task = task_of(spec.task, spec.data_format)
        factory = ShardFactory(self._id, job, spec, own_task, device)
        check_gpu_memory(factory.planned_memory(), factory.planned_memory(spec.workers.max), device)
        with_teacher = partial(training_task, spec, own_task, factory.vocab_size, device)
        factory.task = open_when_there(with_teacher, run_dir, self._mailbox.refuse_rows)
        opening = partial(open_batches, spec, job.store_dir, factory.task, device)
        feed = open_when_there(opening, run_dir, self._mailbox.refuse_rows)
        if spec.has_own_code and (spec.model.impl == "native" or is_small(factory.params)):
            rehearse(spec, factory.vocab_size, own_task, device, feed.rows_to_try())
        warm_up(spec, factory.vocab_size, device, factory.address)
        memory = ReservedMemory(factory.planned_memory(), factory.snapshot_memory) if device.type == "cpu" else None
        self._trainer = Trainer(self._mailbox, factory, feed, self._caller)
        self._mailbox.publish(phase=Phase.STANDBY)
        if memory is not None:
            memory.populate_the_rest()
        threading.Thread(target=self._watch_controller, args=(job.orphan_s,), name="orphan", daemon=True).start()
        return self._trainer

    def _hear_sigterm(self, before: Any) -> None:
        """Report that this process will soon be killed: its controller releases it once others have its shard. A second
        SIGTERM ends it at once."""
        signal.signal(signal.SIGTERM, before)
        # Not in the handler: the signal may have interrupted a thread that holds the mailbox's lock.
        threading.Thread(target=self._leave, name="leave", daemon=True).start()

    def _leave(self) -> None:
        log.warning("%s received SIGTERM", self._id)
        self._mailbox.publish(leaving=True)

    def _heard(self) -> None:
        self._last_heard = time.monotonic()

    def _watch_controller(self, orphan_s: float) -> None:
        """Exit once no controller has called for `orphan_s` seconds: the worker is orphaned.

        Counts ticks instead of reading the clock: while the process is stopped (a paused container, a suspended
        machine) it can't receive calls, and its controller may well have been stopped with it.
        """
        last_call, quiet_s = self._last_heard, 0.0
        while quiet_s < orphan_s:
            time.sleep(ORPHAN_TICK_S)
            quiet_s = quiet_s + ORPHAN_TICK_S if self._last_heard == last_call else 0.0
            last_call = self._last_heard
        log.error("%s exits: no controller has called for %.0f s", self._id, quiet_s)
        flush_logs(FLUSH_S)
        os._exit(1)
