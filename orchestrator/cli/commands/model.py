"""`model export | eval | generate`: a run's model, from run storage alone."""

import math
import secrets
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.terminal.answers import EvaluatedModel, ExportedModel, GeneratedText
from orchestrator.cli.terminal.format import counted, size
from orchestrator.cli.terminal.options import GROUPS, Address, Output, RunId, Step, Storage
from orchestrator.cli.terminal.output import Format, in_words_of_options, narrate, show_answer
from orchestrator.errors import UsageError
from orchestrator.protocol.child_process import (
    Evaluation,
    EvaluationResult,
    Generation,
    GenerationResult,
    Remark,
    Split,
    TextPiece,
)

OPTIONS = {"data.source": "--corpus", "data.text_key": "--text-key"}  # names in the library, and here

app = typer.Typer(no_args_is_help=True, help="A run's model: exported, measured, used.")


class ModelFormat(StrEnum):
    HF = "hf"
    PEFT = "peft"


class Weights(StrEnum):
    LAST = "last"
    EMA = "ema"


class Dtype(StrEnum):
    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"


Computed = Annotated[
    Dtype,
    typer.Option("--dtype", help="Of the model's matrices; int8, int4: integer products, where there is a kernel."),
]

EarlyExit = Annotated[
    bool,
    typer.Option(
        "--early-exit",
        help="Tokens leave at the model's exits, by the rule that `model eval --max-loss-increase` has kept.",
    ),
]


@app.command()
def export(
    run: RunId,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new directory.", show_default=False)],
    model_format: Annotated[
        ModelFormat,
        typer.Option("--format", help="hf: as transformers loads it. peft: the adapters alone (model.lora)."),
    ] = ModelFormat.HF,
    step: Step = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            "--dtype",
            help="Of the weights; routers stay fp32. int8, int4: as compressed-tensors. Default: the job's precision.",
        ),
    ] = None,
    weights: Annotated[
        Weights, typer.Option("--weights", help="ema: their average, of a job with train.ema.")
    ] = Weights.LAST,
    storage: Storage = None,
    address: Address = None,
    output: Output = Format.TEXT,
) -> None:
    """Write a run's model as a directory that other libraries load. Prints the directory."""
    from orchestrator.checkpoint.hf.adapters import export_peft
    from orchestrator.cli.terminal.run_lookup import find_run
    from orchestrator.errors import NotFound
    from orchestrator.run_records.job_files import read_job
    from orchestrator.submission.model_process import export_model

    if model_format is ModelFormat.PEFT and dtype is not None:
        raise UsageError("--dtype is for --format hf; adapters are written in fp32", unchanged="Nothing was written.")
    files = find_run(run, storage, address).files
    run_dir, checkpoint = files.run_dir, files.choose_checkpoint(step)
    if checkpoint is None:
        raise NotFound(f"run {run} has no checkpoint yet", unchanged="Nothing was written.")
    job = read_job(run_dir)
    dtype = dtype or Dtype(job.train.precision)
    if model_format is ModelFormat.PEFT:
        dtype, num_bytes = Dtype.FP32, export_peft(checkpoint, job, out.absolute(), weights is Weights.EMA)
    else:
        num_bytes = export_model(run_dir, job, checkpoint, out.absolute(), dtype.value, weights is Weights.EMA)
    if job.train.quantization is not None and dtype in (Dtype.FP32, Dtype.BF16) and model_format is ModelFormat.HF:
        trained = job.train.quantization.weight_dtype
        narrate(f"These weights aren't rounded, though the run trained for it: --dtype {trained} rounds them.")
    narrate(f"{checkpoint.name} of run {run} as {dtype}: {size(num_bytes)} of weights.")
    show_answer(output, ExportedModel(run, str(checkpoint), str(out.absolute()), num_bytes), str(out))


@app.command("eval")
def evaluate(
    run: RunId,
    corpus: Annotated[
        str | None, typer.Option("--corpus", metavar="SOURCE", help="A text as in data.source. Default: the run's own.")
    ] = None,
    text_key: Annotated[
        str | None, typer.Option("--text-key", metavar="KEY", help="Key or column with the text. Default: the job's.")
    ] = None,
    split: Annotated[Split | None, typer.Option("--split", help="Of the run's own text. Default: validation.")] = None,
    step: Step = None,
    max_rows: Annotated[
        int | None, typer.Option("--max-rows", min=1, metavar="N", help="Rows of the job's length. Default: all.")
    ] = None,
    dtype: Computed = Dtype.FP32,
    early_exit: EarlyExit = False,
    max_loss_increase: Annotated[
        float | None,
        typer.Option(
            "--max-loss-increase",
            min=0.0,
            metavar="SHARE",
            help="Find a rule by which tokens leave at the model's exits, with at most SHARE more loss (0.01: 1 %) "
            "than all layers have. It is fitted on half of the rows, measured on the others, and kept for "
            "--early-exit.",
        ),
    ] = None,
    storage: Storage = None,
    address: Address = None,
    output: Output = Format.TEXT,
) -> None:
    """Measure a run's model on a text: loss per token in nats, perplexity, bits per byte."""
    from orchestrator.cli.terminal.run_lookup import find_run
    from orchestrator.cli.terminal.summary import aligned
    from orchestrator.submission.model_process import ask_model, checkpoint_to_ask, data_of

    chosen = _chosen(corpus, text_key, split)
    if early_exit and max_loss_increase is not None:
        raise UsageError("--max-loss-increase finds another rule than the one that --early-exit uses; leave one out")
    if max_loss_increase is not None and not math.isfinite(max_loss_increase):
        raise UsageError(f"--max-loss-increase is {max_loss_increase}; it must be a share, such as 0.01")
    files = find_run(run, storage, address).files
    run_dir = files.run_dir
    checkpoint = checkpoint_to_ask(run, run_dir, step)
    where = _absolute(corpus)
    request = Evaluation(
        run_dir=str(run_dir),
        checkpoint=str(checkpoint),
        store_dir=data_of(run, run_dir).store_dir if corpus is None else None,
        split=chosen,
        corpus=where,
        text_key=text_key or files.job().data.text_key,
        max_rows=max_rows,
        dtype=dtype.value,
        early_exit=early_exit,
        max_loss_increase=max_loss_increase,
    )
    text = where or f"{request.split} split"
    narrate(f"{checkpoint.name} of run {run} in {dtype} on {text}.")
    with in_words_of_options(OPTIONS, writes=max_loss_increase is not None):
        for answer in ask_model(request):
            if isinstance(answer, Remark):
                narrate(answer.text)
            elif isinstance(answer, EvaluationResult):
                result = answer
    if result.exit_rule is not None:
        narrate(f"{result.exit_rule} is the rule from now on: --early-exit uses it.")
    unit = result.unit.removesuffix("s")
    lines = [("loss", f"{result.loss:.4f} nats per {unit}")]
    if result.loss_of_all_layers is not None:
        lines.append(("loss, all layers", f"{result.loss_of_all_layers:.4f} nats per {unit}"))
        lines.append(("layers", f"{result.mean_layers:.2f} of {files.job().model.num_hidden_layers} per {unit}"))
    if result.perplexity is not None:
        lines.append(("perplexity", f"{result.perplexity:,.2f}"))
    if result.bits_per_byte is not None:
        lines.append(("bits per byte", f"{result.bits_per_byte:.4f}"))
    of_text = f", {result.num_bytes:,} bytes of text" if result.num_bytes else ""
    lines.append((result.unit, f"{result.units:,} in {counted(result.rows, 'row')}{of_text}"))
    lines += [(name, f"{value:.4f}") for name, value in result.metrics.items()]
    measured = EvaluatedModel(**vars(result), run_id=run, checkpoint=str(checkpoint), source=text, dtype=dtype.value)
    show_answer(output, measured, aligned(lines))


@app.command()
def generate(
    run: RunId,
    prompt: Annotated[
        str,
        typer.Option(
            "--prompt",
            metavar="TEXT",
            help="Start of the text, or of a chat what the user says; - reads it from stdin.",
        ),
    ],
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, metavar="N", help="Tokens to generate.")] = 100,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, metavar="T", help="0: the likeliest token each time.")
    ] = 0.8,
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=1, metavar="K", help="Sample from the K likeliest. Default: all.")
    ] = None,
    top_p: Annotated[
        float, typer.Option("--top-p", max=1.0, metavar="P", help="Sample from those that hold this probability.")
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, metavar="S", help="Seed of the sampling. Default: a random one.")
    ] = None,
    step: Step = None,
    dtype: Computed = Dtype.FP32,
    early_exit: EarlyExit = False,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile the layers for the tokens after the prompt, by torch.compile: takes up to a minute at first.",
        ),
    ] = False,
    storage: Storage = None,
    address: Address = None,
    output: Output = Format.TEXT,
) -> None:
    """Generate text from a run's model. Prints the continuation as it is made; Ctrl-C ends it."""
    from orchestrator.cli.terminal.run_lookup import find_run
    from orchestrator.submission.model_process import ask_model, checkpoint_to_ask

    if not top_p > 0.0 or not math.isfinite(temperature):
        raise UsageError(f"--top-p is {top_p}, --temperature {temperature}; the first must be above 0, both finite")
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise UsageError("the prompt is empty", remedy="Give it some text: --prompt TEXT, or --prompt - for stdin.")
    files = find_run(run, storage, address).files
    run_dir = files.run_dir
    checkpoint = checkpoint_to_ask(run, run_dir, step)
    seed = secrets.randbits(31) if seed is None else seed
    request = Generation(
        str(run_dir),
        str(checkpoint),
        text,
        max_tokens,
        temperature,
        top_k,
        top_p,
        seed,
        dtype.value,
        early_exit,
        compiled,
    )
    for answer in ask_model(request):
        if isinstance(answer, Remark):
            narrate(answer.text)
        elif isinstance(answer, TextPiece) and output is Format.TEXT:
            sys.stdout.write(answer.text)
            sys.stdout.flush()
        elif isinstance(answer, GenerationResult):
            result = answer
    if result.mean_layers is not None and output is Format.TEXT:
        num_layers = files.job().model.num_hidden_layers
        narrate(f"\nA token ran {result.mean_layers:.2f} of {num_layers} layers.")
    made = GeneratedText(
        **vars(result), run_id=run, checkpoint=str(checkpoint), prompt=text, seed=seed, dtype=dtype.value
    )
    show_answer(output, made, "")


def _chosen(corpus: str | None, text_key: str | None, split: Split | None) -> Split:
    """The split of the run's own text; options that contradict each other are refused."""
    if corpus is not None and split is not None:
        raise UsageError("--split selects from the run's own text; --corpus names another one, which is read whole")
    if corpus is None and text_key is not None:
        raise UsageError("--text-key needs --corpus: the run's own text is stored as tokens")
    return split or Split.VALIDATION


def _absolute(corpus: str | None) -> str | None:
    if corpus is None or corpus.startswith("builtin:"):
        return corpus
    return str(Path(corpus).expanduser().absolute())


def register(main: typer.Typer) -> None:
    main.add_typer(app, name="model", rich_help_panel=GROUPS)
