"""`data prepare`: make a token store, on which jobs train, from text of any size. `data teach`: compute a teacher's
predictions for one."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from orchestrator.cli.terminal import signals
from orchestrator.cli.terminal.answers import PreparedStore, TeacherLogits
from orchestrator.cli.terminal.format import counted, size
from orchestrator.cli.terminal.options import GROUPS, Address, Output
from orchestrator.cli.terminal.output import Format, in_words_of_options, narrate, show_answer
from orchestrator.cli.terminal.progress import LINE_EVERY_S, StatusLine
from orchestrator.errors import UsageError

REDRAW_EVERY_S = 0.1
OPTIONS = {  # names in the library, and here
    "data.source": "SOURCE",
    "data.text_key": "--text-key",
    "data.vocab_size": "--vocab-size",
    "data.tokenizer": "--tokenizer",
    "data.holdout": "--holdout",
    "curriculum.signal": "--difficulty",
    "min_chars": "--min-chars",
    "max_chars": "--max-chars",
    "max_bad": "--max-bad",
}

app = typer.Typer(no_args_is_help=True, help="Prepare text for training.")


@app.command()
def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE", help="Files, folders or built-in texts, as in data.source of a job file."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Directory of stores, each named by its content.")],
    text_key: Annotated[str, typer.Option("--text-key", metavar="KEY", help="Key or column with the text.")] = "text",
    vocab_size: Annotated[int, typer.Option("--vocab-size", min=257, help="Tokens to learn, at most.")] = 2048,
    tokenizer: Annotated[
        Path | None,
        typer.Option("--tokenizer", metavar="FILE", help="A tokenizer.json to use instead of learning one."),
    ] = None,
    holdout: Annotated[
        float, typer.Option("--holdout", metavar="SHARE", help="Share of the documents kept for validation.")
    ] = 0.05,
    difficulty: Annotated[
        str | None,
        typer.Option("--difficulty", metavar="SIGNAL", help="Score documents, as curriculum.signal of a job file."),
    ] = None,
    min_chars: Annotated[int | None, typer.Option("--min-chars", min=1, help="Leave shorter documents out.")] = None,
    max_chars: Annotated[int | None, typer.Option("--max-chars", min=1, help="Leave longer documents out.")] = None,
    keep_duplicates: Annotated[
        bool, typer.Option("--keep-duplicates", help="Keep documents with the text of an earlier one.")
    ] = False,
    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar="W,W...", help="Shares of the sources in the training tokens. Default: all."),
    ] = None,
    max_bad: Annotated[
        float, typer.Option("--max-bad", metavar="SHARE", help="Share of the records that may be left out as bad.")
    ] = 0.001,
    address: Address = None,
    output: Output = Format.TEXT,
) -> None:
    """Make a token store from text, on all nodes of a cluster. Name its directory as data.source of a job.

    Without a cluster, one is started on this machine and ended afterwards. Ctrl-C ends it; the same command continues.
    """
    from orchestrator.cli.terminal.summary import aligned
    from orchestrator.data.prepare.pipeline import prepare_corpora
    from orchestrator.data.prepare.ray_map import on_cluster
    from orchestrator.data.prepare.request import Request, check

    request = Request(
        tuple(str(source) if source.startswith("builtin:") else str(Path(source).expanduser()) for source in sources),
        vocab_size,
        holdout,
        text_key,
        None if tokenizer is None else tokenizer.expanduser(),
        difficulty,
        min_chars,
        max_chars,
        not keep_duplicates,
        None if weights is None else _numbers(weights),
        max_bad,
    )
    progress = ProgressLine()
    with in_words_of_options(OPTIONS):
        check(request)  # before connecting to a cluster or starting one
        with _cluster(address):
            try:
                done = prepare_corpora(request, out.expanduser(), on_cluster, progress.tell)
            except KeyboardInterrupt:
                progress.close()
                narrate("Ended. Finished work is kept: the same command continues.")
                raise
            finally:
                progress.close()
    if done.found:
        narrate("The store was there already. Nothing was changed.")
    result = described(done)
    show_answer(output, result, aligned(_lines(result)))


@app.command()
def teach(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="Directory of a token store, as data prepare writes.")],
    teacher: Annotated[
        Path,
        typer.Option("--teacher", metavar="DIR", help="Model, checkpoint or run, as distill.teacher of a job file."),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Directory of results, each named by its options. Default: STORE's."),
    ] = None,
    sequence_length: Annotated[
        int, typer.Option("--sequence-length", min=1, help="Tokens of a row, as train.sequence_length of a job file.")
    ] = 128,
    top_k: Annotated[
        int, typer.Option("--top-k", min=1, help="Likeliest tokens to keep of each prediction; others are summed up.")
    ] = 32,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.01, max=100.0, help="As distill.temperature of a job file.")
    ] = 2.0,
    isolate_documents: Annotated[
        bool, typer.Option("--isolate-documents", help="Attention stays within documents, as data.isolate_documents.")
    ] = False,
    address: Address = None,
    output: Output = Format.TEXT,
) -> None:
    """Compute once what a teacher predicts for a token store, on all nodes of a cluster: distill.logits of a job.

    Without a cluster, one is started on this machine and ended afterwards. Ctrl-C ends it; the same command continues.
    """
    from orchestrator.cli.terminal.summary import aligned
    from orchestrator.data.prepare.ray_map import on_cluster
    from orchestrator.submission.teaching import TeachRequest, plan_teaching, teach

    directory = store.expanduser().absolute()
    request = TeachRequest(
        directory,
        teacher.expanduser().absolute(),
        directory.parent if out is None else out.expanduser().absolute(),
        sequence_length,
        isolate_documents,
        top_k,
        temperature,
    )
    plan = plan_teaching(request)  # before connecting to a cluster or starting one
    found, progress = plan.is_done, ProgressLine()
    if not found:
        narrate(f"Predictions of {size(plan.num_bytes)} for {directory.name}, by {plan.teacher.directory}.")
    with nullcontext() if found else _cluster(address):
        try:
            logits = teach(plan, partial(on_cluster, memory=plan.task_bytes), progress.tell)
        except KeyboardInterrupt:
            progress.close()
            narrate("Ended. Finished work is kept: the same command continues.")
            raise
        finally:
            progress.close()
    if found:
        narrate("The predictions were there already. Nothing was changed.")
    manifest = logits.manifest
    result = TeacherLogits(
        logits=str(logits.directory),
        found=found,
        teacher=manifest.teacher,
        store=str(directory),
        sequence_length=sequence_length,
        top_k=top_k,
        temperature=temperature,
        rows={split: manifest.num_rows[split] for split in manifest.num_rows},
        bytes=sum(file.num_bytes for file in manifest.files.values()),
    )
    rows = ", ".join(f"{number:,} of {split}" for split, number in result.rows.items())
    lines = [("logits", result.logits), ("teacher", result.teacher), ("rows", rows), ("size", size(result.bytes))]
    show_answer(output, result, aligned(lines))


def described(done: Any) -> PreparedStore:
    """Counts and paths of what was read, dropped and written."""
    manifest = done.store.manifest
    return PreparedStore(
        store=str(done.store.directory),
        found=done.found,
        records=done.num_records,
        empty=done.num_empty,
        sources=[source.model_dump(mode="json") for source in manifest.sources],
        quarantine=None if done.quarantine is None else str(done.quarantine),
        splits={split: counts.model_dump() for split, counts in manifest.splits.items()},
        vocab_size=manifest.vocab_size,
        tokenizer_digest=manifest.tokenizer_digest,
    )


class ProgressLine(StatusLine):
    """A bar on stderr; without a terminal, a line for each stage and every few seconds."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(stream)
        self._stage = ""
        self._written_s = 0.0

    def tell(self, stage: str, fraction: float) -> None:
        every_s = REDRAW_EVERY_S if self.refreshes else LINE_EVERY_S
        if stage == self._stage and time.monotonic() - self._written_s < every_s:
            return
        self._stage, self._written_s = stage, time.monotonic()
        line = f"{stage} {fraction:.0%}"
        if self.refreshes:
            self.draw(round(1000 * fraction), 1000, line)
        elif stage != "done":
            self.keep(line)


def _lines(result: PreparedStore) -> list[tuple[str, str]]:
    read = f"{result.records:,} records, {result.empty:,} of them without text"
    lines = [("store", result.store), ("read", read)]
    for source in result.sources:
        dropped = {reason: count for reason, count in (source.get("dropped") or {}).items() if count}
        left_out = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
        kept = f"{source['name']}: {counted(source['num_documents'], 'document')}, {size(source['num_bytes'])}"
        lines.append(("kept", f"{kept}; left out: {left_out or 'none'}"))
    lines.append(("quarantine", result.quarantine or "nothing"))
    for split, counts in result.splits.items():
        lines.append((split, f"{counts['num_documents']:,} documents, {counts['num_tokens']:,} tokens"))
    lines.append(("tokenizer", f"{result.vocab_size:,} tokens, sha256 {result.tokenizer_digest[:16]}"))
    return lines


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--weights {text}: numbers with commas between them, as in 0.7,0.3") from None


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """A connection to the named cluster, or to the local one, which is started if necessary and then ended again."""
    from orchestrator.cluster import local
    from orchestrator.cluster.connection import connect, disconnect

    fresh = False
    if address is None:
        started = local.up(os.cpu_count() or 1)
        address, fresh = started.record.address, started.fresh
    try:
        if fresh:
            narrate(f"Started Ray on this machine ({started.record.num_cpus} logical CPUs).")
        connect(address)
        yield
    finally:
        with signals.ignored():
            used = fresh and _is_used_by_others()
            disconnect()
            if used:
                narrate("The local cluster stays up: it has other users now. End it with `orchestrator cluster down`.")
            elif fresh:
                local.down()
                narrate("Stopped the Ray that was started.")


def _is_used_by_others() -> bool:
    """Whether a run was submitted to the cluster meanwhile: its Scheduler then never ends."""
    import ray

    from orchestrator.cluster.connection import NAMESPACE

    if not ray.is_initialized():
        return False
    return any(actor["namespace"] == NAMESPACE for actor in ray.util.list_named_actors(all_namespaces=True))


def register(main: typer.Typer) -> None:
    main.add_typer(app, name="data", rich_help_panel=GROUPS)
