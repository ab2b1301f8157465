"""Data preparation in its own process: makes or finds the token store, and saves the tokenizer with the run."""

import errno
import logging
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from orchestrator.code_package import of_user, placed
from orchestrator.data.bucket_store import node_stores, upload
from orchestrator.data.logit_store import LogitStore
from orchestrator.data.manifest import TOKENIZER
from orchestrator.data.prepare.job_store import check_enough, check_vocabulary, prepare
from orchestrator.data.rows.chat_tokenizer import SAVED
from orchestrator.data.rows.prepare_rows import check_outputs, prepare_rows
from orchestrator.data.rows.reference_rows import with_reference
from orchestrator.data.sample_order import Orders
from orchestrator.data.store import TokenStore
from orchestrator.data.tokenizer import CONFIG
from orchestrator.errors import DataNotWritten, EntrypointError
from orchestrator.requirements import use_requirements
from orchestrator.run_records.prepared_data import PreparationProgress, PreparedData
from orchestrator.secrets import take_secrets
from orchestrator.spec.data import BY_DOCUMENT
from orchestrator.spec.job import JobSpec
from orchestrator.spec.task import PREFERENCE
from orchestrator.storage.atomic import make_folders
from orchestrator.storage.backends.location import Location, location_of, objects_at
from orchestrator.storage.condition import StorageCondition, refusal
from orchestrator.storage.reserve import has_room
from orchestrator.tracking.sinks.sink import Dataset

log = logging.getLogger("orchestrator.data")

AGAIN_S, AGAIN_AT_MOST_S = 1.0, 60.0  # until what was refused is tried again
OF_RUN = {TOKENIZER, CONFIG, SAVED}  # files of a store of rows that are saved with the run too


class Preparation:
    """Hosted by `cluster.actors.Host`, so the control layer loads no tokenizer. See `prepared_data.PreparationApi`."""

    def __init__(self) -> None:
        self._progress = PreparationProgress()
        self._stages = [self._progress.stage]  # in the order in which they began
        self._refused = PreparationProgress()  # where it was when storage refused a write
        self._num_calls = 0

    def progress(self) -> PreparationProgress:
        """How far it has come."""
        return self._progress

    def prepare(self, job_json: str, run_dir: str, data_dir: str) -> PreparedData:
        """Make or find the job's token store, and save its tokenizer with the run. Tried again while storage refuses
        to be written: what is done by then is kept, and is read when it has its digest.

        Args:
            run_dir, data_dir: locations of the run, and of token stores. For a bucket a store is made on this node, and
                copied there.

        Raises:
            DataError: a corpus that can't be read, or is too small for the job.
            StoreCorrupt: a store that doesn't match its digests.
        """
        job = JobSpec.model_validate_json(job_json)
        run, place = location_of(run_dir), location_of(data_dir)
        if job.has_rows or job.pip:
            take_secrets(job.secrets)  # which a user's rows may need, or pip
        use_requirements(job.pip)
        self._num_calls += 1
        call = self._num_calls
        while True:
            began_s = time.monotonic()
            try:
                if isinstance(run, Path):
                    make_folders(run, run)  # else directories would be made where its file system isn't mounted
                job = placed(job, run)
                return (self._prepare_rows if job.has_rows else self._prepare_text)(job, run, place)
            except EntrypointError as error:
                error.message, error.traceback = of_user(error.message), of_user(error.traceback)
                raise
            except (OSError, DataNotWritten) as error:
                if call != self._num_calls:  # of a controller that is gone: its successor has called too
                    raise
                log.error("tried again until it succeeds: %s", error)
                self._wait(run, error, tried_s=time.monotonic() - began_s)

    def _wait(self, run: Location, error: OSError | DataNotWritten, tried_s: float) -> None:
        """Wait until the next attempt, which may read the whole corpus again, and show why. A full file system must
        have room for more than what the run's journal needs."""
        cause = error if isinstance(error, OSError) else error.__cause__
        refused = cause if isinstance(cause, OSError) else OSError(errno.EIO, str(error))  # of another process
        trouble = refusal("prepared data can't be written", refused)
        self._progress = self._refused = replace(self._progress, trouble=trouble)
        time.sleep(min(max(AGAIN_S, tried_s), AGAIN_AT_MOST_S))
        with suppress(OSError):  # the next attempt shows it
            while isinstance(run, Path) and trouble.condition is StorageCondition.FULL and not has_room(run):
                time.sleep(AGAIN_S)

    def _prepare_text(self, job: JobSpec, run: Location, place: Location) -> PreparedData:
        """Make or find the job's token store, and save its tokenizer with the run."""
        data = job.data
        store = prepare(
            data.source,
            data.vocab_size,
            data.holdout,
            place if isinstance(place, Path) else node_stores(),
            self._tell,
            text_key=data.text_key,
            tokenizer=None if data.tokenizer is None else Path(data.tokenizer),
            difficulty=None if job.curriculum is None else job.curriculum.signal,
            code_dir=Path("." if job.curriculum is None else job.curriculum.code_dir),
        )
        check_vocabulary(job.model.vocab_size, store.vocab_size)
        check_enough(
            store,
            job.train.sequence_length,
            job.train.global_batch_size,
            int(job.eval.every is not None),
            by_document=job.data.row_format == BY_DOCUMENT,
        )
        if job.distill is not None and job.distill.logits is not None:
            LogitStore.open(Path(job.distill.logits), verify=True).check(store.digest)
        Orders(job, store)  # shows what a curriculum lacks, before any worker has the store
        tokenizer, stored = _save(store, run, place)
        datasets = tuple(
            Dataset(
                f"{source.name}/{split}", split, source.digest, data.source, counts.num_documents, counts.num_tokens
            )
            for source in store.manifest.sources
            for split, counts in store.manifest.splits.items()
        )
        return PreparedData(str(stored), store.vocab_size, str(tokenizer), datasets)

    def _prepare_rows(self, job: JobSpec, run: Location, place: Location) -> PreparedData:
        """Make or find the job's store of rows, and save what turns text into tokens with the run."""
        here = place if isinstance(place, Path) else node_stores()
        store = prepare_rows(job, here, self._tell)
        if store.manifest.num_outputs:
            check_outputs(job, store.manifest.num_outputs)
        if job.data_format == PREFERENCE:
            store = with_reference(job, store, here, self._tell)
        stored: Location = store.directory
        if not isinstance(place, Path):
            stored = place / store.directory.name  # under this node's own path, without a copy
            upload(store.directory, store.manifest.files, stored)
        files = {name for name in store.manifest.files if name in OF_RUN}
        for name in files:
            objects_at(run).create(name, (store.directory / name).read_bytes())
        made_of, name = store.manifest.made_of, job.data.entrypoint or job.data.source
        datasets = tuple(
            Dataset(f"{name}/{split}", split, store.digest, str(made_of["source"]), counts.num_rows, counts.num_tokens)
            for split, counts in store.manifest.splits.items()
        )
        tokenizer = str(run / TOKENIZER) if TOKENIZER in files else ""
        return PreparedData(str(stored), store.manifest.num_outputs, tokenizer, datasets)

    def _tell(self, stage: str, fraction: float) -> None:
        if stage not in self._stages:
            self._stages.append(stage)
        refused, at = self._refused, (self._stages.index(stage), fraction)
        is_past = at > (self._stages.index(refused.stage), refused.share)
        self._progress = PreparationProgress(stage, fraction, None if is_past else refused.trouble)


def _save(store: TokenStore, run: Location, place: Location) -> tuple[Location, Location]:
    """Save the tokenizer with the run, and in a bucket the store too.

    Returns:
        locations of the tokenizer and of the store.
    """
    if isinstance(run, Path):
        file = run / TOKENIZER
        store.tokenizer().save(file)
        return file, store.directory
    for name, data in store.tokenizer().files(TOKENIZER).items():
        objects_at(run).create(name, data)
    stored = place / store.digest[:32]  # the user may have named the directory
    upload(store.directory, store.manifest.files, stored)
    return run / TOKENIZER, stored
