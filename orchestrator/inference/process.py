"""Child process for inference: it reads one request from stdin and writes JSON lines of answers to a pipe.

    python -m orchestrator.inference.process FD < request.json

`orchestrator.submission.model_process` starts it. It needs no engine and no world, and reads weights from the
checkpoint, but no optimizer moments.
"""

import traceback
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from orchestrator.checkpoint.hf.export import INTEGERS, with_folded_routers, write_model
from orchestrator.code_package import placed
from orchestrator.data.manifest import TOKENIZER
from orchestrator.data.rows.bucket_rows import open_rows
from orchestrator.data.rows.chat_tokenizer import ChatPrompts
from orchestrator.data.tokenizer import TextTokenizer
from orchestrator.elastic.state_spec import adapted_by
from orchestrator.errors import OrchestratorError, UsageError
from orchestrator.inference.evaluate import evaluate
from orchestrator.inference.exit_rule import exits_of, load_rule
from orchestrator.inference.generate import Prompt, generate, refuse_compiling
from orchestrator.inference.int_export import IntFormat
from orchestrator.inference.int_model import as_rounded_in_training, formats_of, refuse_integers
from orchestrator.inference.load_model import load_model
from orchestrator.inference.transformers_export import write_transformers
from orchestrator.model.base import TrainableModel
from orchestrator.model.linear.low_rank import LowRankAdapter
from orchestrator.protocol.child_process import (
    MODEL_LINES,
    Answer,
    Evaluation,
    Export,
    ExportResult,
    Fault,
    Generation,
    Remark,
    Request,
    answering,
)
from orchestrator.requirements import use_requirements
from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.location import location_of, objects_at


def answers(request: Request) -> Iterator[Answer]:
    """Answers to the request, the result last."""
    run_dir = location_of(request.run_dir)
    job = JobSpec.model_validate_json(objects_at(run_dir).get("job.json"))
    if job.has_own_code:
        use_requirements(job.pip)
        job = placed(job if request.code is None else job.model_copy(update={"code": request.code}), run_dir)
    tokenizer = TextTokenizer.load(run_dir / TOKENIZER) if job.has_tokens else None
    prepared = 0 if tokenizer is None else tokenizer.vocab_size
    if isinstance(request, Evaluation) and request.store_dir is not None and not job.has_tokens:
        prepared = open_rows(location_of(request.store_dir)).manifest.num_outputs
    if isinstance(request, Evaluation) and request.store_dir is None and job.has_rows:
        raise UsageError(
            f"run {job.name} has task {job.task.entrypoint or job.task.name}, whose rows no text can replace",
            remedy="Leave --corpus out: the run's own rows are read.",
        )
    if isinstance(request, Generation) and tokenizer is None:
        raise UsageError(f"run {job.name} has task {job.task.entrypoint or job.task.name}, which has no text")
    if isinstance(request, Generation) and job.model.router.selection == "expert_choice":
        raise UsageError(
            f"experts of run {job.name} choose their tokens (model.router.selection: expert_choice), among later ones "
            "too, which don't exist yet while text is generated",
            remedy="Train with selection top_k or top_p to generate; `model eval` works with this run.",
        )
    prompt = None
    if isinstance(request, Generation) and tokenizer is not None:
        prompt = Prompt.of(
            request.prompt, job, tokenizer, ChatPrompts.load(run_dir, tokenizer) if job.has_chats else None
        )
    if isinstance(request, Generation) and request.compiled:
        refuse_compiling(job, request.dtype)
    if isinstance(request, Evaluation) and request.max_loss_increase is not None:
        exits_of(job)
    rule = None
    if not isinstance(request, Export) and request.early_exit:
        kept = load_rule(run_dir, location_of(request.checkpoint).name, job)
        rule = kept.rule
        if kept.dtype != request.dtype:
            yield Remark(f"The rule of exits was fitted in {kept.dtype}: in {request.dtype} the loss may rise more.")
    if request.dtype in INTEGERS:
        refuse_integers(job, request.dtype, "Nothing was written." if isinstance(request, Export) else "")
    if isinstance(request, Export):
        yield exported(request, job, prepared)
        return
    model = load_model(location_of(request.checkpoint), job, prepared, precision=request.dtype)
    if isinstance(request, Evaluation):
        yield from evaluate(request, job, tokenizer, model, rule)
    elif tokenizer is not None and prompt is not None:
        yield from generate(request, job, tokenizer, model, prompt, rule)


def exported(request: Export, job: JobSpec, prepared: int) -> ExportResult:
    """Write the model.

    Args:
        prepared: as of `load_model`.
    """
    cpu = torch.device("cpu")  # beside the model there are its tensors as they are written
    model = load_model(location_of(request.checkpoint), job, prepared, request.of_ema, cpu)
    length, num_outputs, to = job.train.sequence_length, job.num_outputs(prepared), Path(request.to)
    if not job.model.is_native:
        return ExportResult(write_transformers(model, num_outputs, length, request.dtype, to))
    left, dtype, encoding = job.model_copy(update={"model": model.spec}), request.dtype, None
    if dtype in INTEGERS:
        as_rounded_in_training(model, job)
        dtype, encoding = "fp32", IntFormat(formats_of(job, model, dtype))
    return ExportResult(write_model(merged(model), left, num_outputs, dtype, to, encoding))


def merged(model: TrainableModel) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Weights and buffers of a model, with its adapters in them, and routers of two matrices as one."""
    adapters = {name: module for name, module in model.named_modules() if isinstance(module, LowRankAdapter)}
    of_matrix = {name.replace(".lora.", "."): adapter for name, adapter in adapters.items()}
    tensors = {**dict(model.named_parameters()), **dict(model.state_buffers())}

    def read(name: str) -> NDArray[np.float32]:
        whole = of_matrix[name].merged(tensors[name]) if name in of_matrix else tensors[name]
        values: NDArray[np.float32] = whole.detach().float().cpu().numpy()
        return values

    return with_folded_routers((name for name in tensors if adapted_by(name) is None), read, model.spec)


def main() -> None:
    """Read one request, write its answers."""
    with answering(MODEL_LINES) as (request, send):
        try:
            for answer in answers(request):
                send(answer)
        except OrchestratorError as error:
            send(Fault.of(error))
        except (torch.OutOfMemoryError, MemoryError):
            traceback.print_exc()
            remedy = "Free memory, or request less."
            send(Fault("OrchestratorError", "the model and the request don't fit in memory", remedy, ""))


if __name__ == "__main__":
    main()
